"""Sentences of a build: no padding, no attention between sentences; a unit alone decides which go together."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from build_workers import contents
from counters import Operators
from torch import Tensor

from flowmask.data_pipeline.build import sentences
from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.build.sentences import encode_sentences
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT
from flowmask.data_pipeline.check.repair import repair
from flowmask.data_pipeline.check.verify import verify
from flowmask.data_pipeline.plan.fingerprint import fingerprint
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import CacheError, ConfigError
from flowmask.models.text import TextEncoder
from flowmask.models.weights.wan import WanFolder

# 2 to 12 tokens each, one beyond the short limit; 14 texts
TEXTS = [*(f"the {' '.join(['dog'] * n)} number {n}" for n in range(4)), "a cat", "a bird", "a dog", "two"]
TEXTS += [" ".join(["dog"] * (SHORT_TEXT + 3)), "red", "a red cat", "the cat on the left", "a cow", "two cats"]


@pytest.fixture(scope="module")
def encoder(tiny_wan: Path) -> TextEncoder:
    return WanFolder(tiny_wan).text_encoder(torch.float32)


def embedded(encoder: TextEncoder, texts: list[str], together: int) -> list[dict[int, Tensor]]:
    return encode_sentences(encoder, texts, dtype=torch.float32, together=together)


def test_a_sentence_among_others_is_what_it_is_alone_whoever_they_are(encoder: TextEncoder) -> None:
    """Equal to the bit one at a time; else within the rounding of a product of another size."""
    alone = [embedded(encoder, [text], 1)[0] for text in TEXTS]
    assert [set(one) for one in alone] == [
        {LONG_TEXT, SHORT_TEXT} if len(t.split()) > 9 else {LONG_TEXT} for t in TEXTS
    ]
    for together in (1, 2, 5, 32):
        for texts, wanted in ((TEXTS, alone), (TEXTS[::-1], alone[::-1]), (TEXTS[3:9], alone[3:9])):
            for given, one in zip(embedded(encoder, texts, together), wanted, strict=True):
                assert given.keys() == one.keys()
                for limit, embedding in one.items():
                    assert given[limit].shape == embedding.shape and given[limit].is_contiguous()
                    off = (given[limit] - embedding).norm() / embedding.norm()
                    assert off == 0 if together == 1 else off < 1e-5


def test_a_batch_holds_equally_many_tokens_and_costs_what_its_tokens_cost(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FLOPs of single sentences in fewer passes; padding to the long limit would cost many times more."""
    sizes = Counter(len(encoder.token_ids(text, max_tokens=LONG_TEXT)) for text in TEXTS) + Counter([SHORT_TEXT])
    flop, passes, real = {}, list[torch.Size](), TextEncoder.together

    def counted(self: TextEncoder, ids: Any) -> Tensor:
        found = real(self, ids)
        passes.append(found.shape[:2])
        return found

    monkeypatch.setattr(TextEncoder, "together", counted)
    for together in (1, 3):
        passes.clear()
        with Operators() as operators:
            embedded(encoder, TEXTS, together)
        flop[together] = operators.flop
        assert {length for _, length in passes} == set(sizes)
        assert sum(count for count, _ in passes) == sizes.total()
        assert len(passes) == sum(-(-count // together) for count in sizes.values())
    with Operators() as padded:
        encoder.together([[1] * LONG_TEXT] * len(TEXTS))
    assert flop[1] == flop[3] < padded.flop / 8


def test_a_batch_is_sent_off_before_the_one_before_is_taken_and_asks_nothing(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU: it holds no numbers, so code that asks for one fails there."""
    import copy

    seen: list[str] = []

    class Noted:
        def __init__(self, result: Tensor, *, dtype: torch.dtype) -> None:
            assert result.device.type == "meta"
            self.result = torch.zeros(result.shape, dtype=dtype)
            seen.append("sent")

        def get(self) -> list[Tensor]:
            seen.append("taken")
            return [self.result]

    monkeypatch.setattr(sentences, "OnItsWay", Noted)
    on_meta = TextEncoder(encoder.tokenizer, copy.deepcopy(encoder.model).to("meta"))
    with Operators() as operators:
        embedded(on_meta, TEXTS, 2)
    assert operators.sent_bytes and operators.waited_copies == 0
    assert seen == ["sent", *["sent", "taken"] * (len(seen) // 2 - 1), "taken"]


def test_a_number_that_is_not_finite_names_its_sentence(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    together, wrong = TextEncoder.together, encoder.token_ids("two cats")

    def spoiled(self: TextEncoder, ids: Any) -> Tensor:
        found = together(self, ids)
        found[[one == wrong for one in ids], 0, 0] = torch.nan
        return found

    monkeypatch.setattr(TextEncoder, "together", spoiled)
    for at_once in (1, 32):
        with pytest.raises(CacheError, match=r"^sentence 'two cats': .* not finite"):
            embedded(encoder, TEXTS, at_once)


def test_too_little_memory_for_a_batch_is_one_line_with_the_key(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextEncoder, "together", full)
    for together, said in ((1, r"; choose cache\.encoder_dtype"), (2, r"; lower cache\.batch_sentences, choose")):
        with pytest.raises(ConfigError, match=said):
            embedded(encoder, TEXTS, together)


def test_a_cache_of_batches_has_the_same_bytes_again_after_a_repair(make_config, tmp_path) -> None:
    config = make_config(tmp_path / "cache", cache={"views": 1, "batch_sentences": 3})
    build(config)
    whole, shard = contents(config.out), config.out / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    repair(config.out, found=lambda: verify(config.out), config=lambda: config)
    assert contents(config.out) == whole


def test_how_many_go_together_is_part_of_a_caches_identity_unless_it_is_one(make_config, tmp_path) -> None:
    found = {}
    for together in (1, 3):
        config = make_config(tmp_path / "cache", cache={"batch_sentences": together})
        found[together] = fingerprint(config, open_source(config.sources), memo=tmp_path / "memo.json")
    assert "cache.batch_sentences" not in found[1].fields
    assert found[3].fields == {**found[1].fields, "cache.batch_sentences": 3}
    assert found[3].text != found[1].text
    assert (found[3].video, found[3].masks) == (found[1].video, found[1].masks)
