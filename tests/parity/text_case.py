"""Sentences: cleaning, token ids and counts, embeddings, through the loader of a Wan folder."""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from flowmask.models.text import TextEncoder, clean, pad
from flowmask.models.weights.wan import WanFolder
from parity.core import Check, ParitySet, names_are, near, same


def recorded_text_encoder(data: ParitySet) -> TextEncoder:
    """The recorded tokenizer and encoder, written as a Wan folder and opened from it."""
    with tempfile.TemporaryDirectory() as folder:
        for part, place in (("text_encoder", "encoder"), ("tokenizer", "tokenizer")):
            (Path(folder) / part).symlink_to((data.root / "text" / place).resolve())
        return WanFolder(Path(folder)).text_encoder(torch.float32)


def text_checks(data: ParitySet) -> Iterator[Check]:
    io, captions = data.tensors("text/io.safetensors"), data.record("text/captions.json")
    encoder = functools.cache(lambda: recorded_text_encoder(data))
    length = io["input_ids"].shape[1]
    ends = torch.cat([torch.zeros(1), io["token_counts"].cumsum(0)]).long().tolist()
    recorded = io["prompt_embeds_packed"]

    def ids(i: int) -> list[int]:
        return encoder().token_ids(clean(captions[i]["raw"], lowercase=False), max_tokens=length)

    def embedding(i: int) -> None:
        text = clean(captions[i]["raw"], lowercase=False)
        got = encoder()(text, max_tokens=length)
        near(got, recorded[ends[i] : ends[i + 1]], abs=2e-5)
        assert not pad(got, length)[len(got) :].any(), "padding is not zero"

    assert captions, "no captions"
    yield from names_are(io, ("input_ids", "token_counts", "prompt_embeds_packed"))
    yield Check("one row a caption", lambda: same([*io["input_ids"].shape][:1], [len(captions)]))
    yield Check("one count a caption", lambda: same([*io["token_counts"].shape], [len(captions)]))
    yield Check("one embedding a token", lambda: same(len(recorded), ends[-1]))
    for i, caption in enumerate(captions):
        yield Check(f"captions[{i}].clean", lambda c=caption: same(clean(c["raw"], lowercase=False), c["clean"]))
        yield Check(
            f"captions[{i}].untruncated_token_count",
            lambda c=caption: same(encoder().token_count(c["clean"]), c["untruncated_token_count"]),
        )
        yield Check(f"captions[{i}].token_count", lambda i=i, c=caption: same(len(ids(i)), c["token_count"]))
        yield Check(f"token_counts[{i}]", lambda i=i: same(len(ids(i)), io["token_counts"][i].item()))
        yield Check(
            f"input_ids[{i}]", lambda i=i: same(ids(i) + [0] * (length - len(ids(i))), io["input_ids"][i].tolist())
        )
        yield Check(f"prompt_embeds[{i}]", functools.partial(embedding, i))
