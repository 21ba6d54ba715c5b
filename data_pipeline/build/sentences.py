"""The text pass: each distinct sentence of a build goes through UMT5 once, before any clip.

A batch holds sentences with equal numbers of tokens: without padding, no embedding depends on its neighbours. Batches
do not cross units, so bytes do not depend on other workers. Sentences come first, so the text encoder and the VAE
are never on a device together. A sentence over the short limit is also encoded a second time, cut before the encoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT
from flowmask.data_pipeline.cache.shards import write_file
from flowmask.data_pipeline.plan.plan_file import SENTENCES_PER_UNIT, text_unit_path
from flowmask.models.device import OnItsWay, gpu_holds
from flowmask.models.errors import CacheError
from flowmask.models.text import TextEncoder

LESS_MEMORY = "choose cache.encoder_dtype=bfloat16, or cache.device=cpu"  # if the GPU has too little memory


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one sentence, cut to a limit."""

    sentence: int
    limit: int
    ids: list[int]


def encode_sentences(
    encoder: TextEncoder, texts: Sequence[str], *, dtype: torch.dtype, together: int
) -> list[dict[int, Tensor]]:
    """Embeddings [L D] of each cleaned sentence by token limit: LONG_TEXT, and SHORT_TEXT where it cuts.

    together: largest number of sentences in one batch; all have the same number of tokens
    """
    found: list[dict[int, Tensor]] = [{} for _ in texts]

    def take(batch: Sequence[_Tokens], embeddings: Tensor) -> None:
        for tokens, embedding in zip(batch, embeddings, strict=True):
            if not embedding.isfinite().all():
                raise CacheError(
                    f"sentence {texts[tokens.sentence]!r}: the text encoder gave a number that is not finite; "
                    "check the weights"
                )
            found[tokens.sentence][tokens.limit] = embedding.clone(memory_format=torch.contiguous_format)

    fix = "lower cache.batch_sentences, " * (together > 1) + LESS_MEMORY
    before: tuple[list[_Tokens], OnItsWay] | None = None
    for batch in _batches(encoder, texts, size=together):
        with gpu_holds("the text encoder at work", fix=fix):
            sent = OnItsWay(encoder.together([tokens.ids for tokens in batch]), dtype=dtype)
        if before is not None:  # read the results of a batch after launching the next one
            take(before[0], *before[1].get())
        before = batch, sent
    if before is not None:
        take(before[0], *before[1].get())
    return found


def _batches(encoder: TextEncoder, texts: Sequence[str], *, size: int) -> Iterator[list[_Tokens]]:
    """Batches of sentences with equal numbers of tokens, short ones first; equal lengths keep their order."""
    alike: dict[int, list[_Tokens]] = {}
    for tokens in chain.from_iterable(_tokens(encoder, number, text) for number, text in enumerate(texts)):
        alike.setdefault(len(tokens.ids), []).append(tokens)
    for _, some in sorted(alike.items()):
        yield from (some[start : start + size] for start in range(0, len(some), size))


def _tokens(encoder: TextEncoder, number: int, text: str) -> Iterator[_Tokens]:
    whole = _Tokens(number, LONG_TEXT, encoder.token_ids(text, max_tokens=LONG_TEXT))
    yield whole
    if len(whole.ids) > SHORT_TEXT:
        yield _Tokens(number, SHORT_TEXT, encoder.token_ids(text, max_tokens=SHORT_TEXT))


def write_unit(
    folder: Path, unit: int, texts: Sequence[str], *, encoder: TextEncoder, dtype: torch.dtype, together: int
) -> None:
    """Encode the sentences of a unit into its file; together: as `encode_sentences`."""
    found = encode_sentences(encoder, texts, dtype=dtype, together=together)
    tensors = {f"{place}.{limit}": tensor for place, each in enumerate(found) for limit, tensor in each.items()}
    write_file(text_unit_path(folder, unit), save(tensors))


class Embeddings:
    """The finished text units, read by sentence number."""

    def __init__(self, folder: Path):
        self._folder = folder

    def of(self, numbers: Sequence[int]) -> dict[int, dict[int, Tensor]]:
        """Embeddings [L D] by sentence number and token limit, as `encode_sentences` gives them."""
        found: dict[int, dict[int, Tensor]] = {}
        for unit in sorted({number // SENTENCES_PER_UNIT for number in numbers}):
            wanted = {number for number in numbers if number // SENTENCES_PER_UNIT == unit}
            with safe_open(text_unit_path(self._folder, unit), framework="pt") as file:
                stored = set(file.keys())
                for number in wanted:
                    names = {limit: f"{number % SENTENCES_PER_UNIT}.{limit}" for limit in (LONG_TEXT, SHORT_TEXT)}
                    found[number] = {limit: file.get_tensor(name) for limit, name in names.items() if name in stored}
        return found
