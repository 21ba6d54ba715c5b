"""Cleaning is that of the reference; a sentence's embedding depends on nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from trials import SEED

from flowmask.models.text import RecentTexts, TextEncoder, clean, has_words, pad
from flowmask.models.weights.wan import WanFolder

GOLDEN = Path(__file__).parents[1] / "golden" / "parity"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    root = tmp_path_factory.mktemp("wan")
    (root / "text_encoder").symlink_to(GOLDEN / "text" / "encoder")
    (root / "tokenizer").symlink_to(GOLDEN / "text" / "tokenizer")
    return WanFolder(root).text_encoder(torch.float32)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  two\t \n words\u00a0here ", "two words here"),
        ("a &amp; b", "a & b"),
        ("a &amp;amp; b", "a &amp; b"),
        ("one&nbsp;two", "one\u00a0two"),
        ('say ""hi"" \\\\ now', "say hi  now"),
        ('the end "', "the end "),
        ("&quot;quoted&quot;", "quoted"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_cleaning_collapses_space_then_unescapes_once_then_drops_quotes(raw: str, cleaned: str) -> None:
    assert clean(raw, lowercase=False) == cleaned


def test_lower_case_is_a_choice_and_comes_first() -> None:
    assert clean("The DOG", lowercase=True) == "the dog" and clean("The DOG", lowercase=False) == "The DOG"
    assert clean("&Eacute;", lowercase=True) == "\u00e9"


@pytest.mark.parametrize(
    "raw", ["", " ", "&nbsp;", "\u200b", '"""', "\\ \u2028", "&#8203;&zwj;", "\u3164", "\u0301", "\ufeff\u00ad"]
)
def test_a_sentence_of_which_nothing_can_be_seen_has_no_words(raw: str) -> None:
    assert not has_words(clean(raw, lowercase=True))


@pytest.mark.parametrize("raw", ["a", "7", "?", "猫", "&amp;", "🐈", "क्", "\u200bx", "ـ"])
def test_one_letter_digit_or_sign_is_enough(raw: str) -> None:
    assert has_words(clean(raw, lowercase=True))


def test_a_long_sentence_is_cut_before_the_encoder_and_still_ends(encoder: TextEncoder) -> None:
    text = "the red dog running " * 40
    ids = encoder.token_ids(text, max_tokens=16)
    assert len(ids) == 16 and ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.token_count(text) > 16
    assert encoder(text, max_tokens=16).shape[0] == 16
    assert not torch.allclose(encoder(text, max_tokens=16), encoder(text, max_tokens=64)[:16], atol=1e-3)


def test_an_embedding_is_unpadded_and_padding_is_zero(encoder: TextEncoder) -> None:
    embedding = encoder("a dog", max_tokens=64)
    assert embedding.shape == (encoder.token_count("a dog"), 24) and not embedding.requires_grad
    padded = pad(embedding, 64)
    assert torch.equal(padded[: len(embedding)], embedding) and not padded[len(embedding) :].any()
    assert torch.equal(pad(embedding, len(embedding)), embedding)
    with pytest.raises(AssertionError, match="do not fit"):
        pad(embedding, 1)


def test_an_embedding_does_not_depend_on_what_was_encoded_before(encoder: TextEncoder) -> None:
    first = encoder("a dog", max_tokens=64)
    encoder("something else entirely", max_tokens=8)
    assert torch.equal(encoder("a dog", max_tokens=64), first)
    assert torch.equal(encoder("a dog", max_tokens=256), first)


def test_what_was_asked_for_lately_is_not_made_again_and_no_more_than_the_limit_is_kept() -> None:
    rng, made, most = np.random.default_rng(SEED), list[tuple[str, int]](), 4 * 8 * 60

    class Counted(TextEncoder):
        def __init__(self) -> None:
            pass

        def __call__(self, text: str, *, max_tokens: int) -> torch.Tensor:
            made.append((text, max_tokens))
            return torch.full((min(len(text), max_tokens), 8), float(ord(text[0])))

    recent, asked = RecentTexts(Counted(), most_bytes=most), list[tuple[str, int]]()
    for _ in range(500):
        text, tokens = "abcdefghij"[rng.integers(10)] * int(rng.integers(1, 70)), int(rng.choice([16, 64]))
        before = len(made)
        found = recent(text, max_tokens=tokens)
        assert torch.equal(found, torch.full((min(len(text), tokens), 8), float(ord(text[0]))))
        newest: dict[tuple[str, int], int] = {}
        for key in dict.fromkeys(reversed(asked)):
            newest[key] = 4 * 8 * min(len(key[0]), key[1])
            if sum(newest.values()) > most:
                del newest[key]
                break
        assert (len(made) == before) == ((text, tokens) in newest), "the latest that fit into the limit are known"
        assert sum(one.nbytes for one in recent._kept.values()) <= most
        asked.append((text, tokens))
