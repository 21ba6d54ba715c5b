"""The text pass: each distinct sentence of a build goes through UMT5 once, alone, before any clip.

Alone, so that an embedding does not depend on its neighbours in a batch; before, so that the text encoder
and the VAE never share a device. One longer than the short limit is encoded a second time, cut before the
encoder.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from flowmask.data_pipeline.cache.manifest import LONG_TEXT, SHORT_TEXT
from flowmask.data_pipeline.cache.shards import write_file
from flowmask.data_pipeline.plan.plan_file import SENTENCES_PER_UNIT, text_unit_path
from flowmask.models.device import gpu_holds
from flowmask.models.errors import CacheError
from flowmask.models.text import TextEncoder

LESS_MEMORY = "choose cache.encoder_dtype=bfloat16, or cache.device=cpu"  # what to do where the GPU is too small


def encode_sentence(encoder: TextEncoder, text: str, *, dtype: torch.dtype) -> dict[int, Tensor]:
    """Embeddings [L D] of a cleaned sentence by token limit: LONG_TEXT, and SHORT_TEXT where it cuts."""
    with gpu_holds("the text encoder at work", fix=LESS_MEMORY):
        embeddings = {LONG_TEXT: encoder(text, max_tokens=LONG_TEXT)}
        if embeddings[LONG_TEXT].shape[0] > SHORT_TEXT:
            embeddings[SHORT_TEXT] = encoder(text, max_tokens=SHORT_TEXT)
    for embedding in embeddings.values():
        if not embedding.isfinite().all():
            raise CacheError(f"sentence {text!r}: the text encoder gave a number that is not finite; check the weights")
    return {limit: embedding.to(dtype).cpu().contiguous() for limit, embedding in embeddings.items()}


def write_unit(folder: Path, unit: int, texts: Sequence[str], *, encoder: TextEncoder, dtype: torch.dtype) -> None:
    tensors = {
        f"{place}.{limit}": embedding
        for place, text in enumerate(texts)
        for limit, embedding in encode_sentence(encoder, text, dtype=dtype).items()
    }
    write_file(text_unit_path(folder, unit), save(tensors))


class Embeddings:
    """The finished text units, read by sentence number."""

    def __init__(self, folder: Path):
        self._folder = folder

    def of(self, numbers: Sequence[int]) -> dict[int, dict[int, Tensor]]:
        """Embeddings [L D] by sentence number and token limit, as `encode_sentence` gives them."""
        found: dict[int, dict[int, Tensor]] = {}
        for unit in sorted({number // SENTENCES_PER_UNIT for number in numbers}):
            wanted = {number for number in numbers if number // SENTENCES_PER_UNIT == unit}
            with safe_open(text_unit_path(self._folder, unit), framework="pt") as file:
                stored = set(file.keys())
                for number in wanted:
                    names = {limit: f"{number % SENTENCES_PER_UNIT}.{limit}" for limit in (LONG_TEXT, SHORT_TEXT)}
                    found[number] = {limit: file.get_tensor(name) for limit, name in names.items() if name in stored}
        return found
