"""A short warm-up before a build: this worker's encoding speed, from one clip and one sentence of the plan.

Nothing is stored and encoders keep no state, so bytes do not depend on the warm-up.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowmask.data_pipeline.build.clip_pass import ClipPass
from flowmask.data_pipeline.build.sentences import encode_sentences
from flowmask.data_pipeline.cache.manifest import LONG_TEXT
from flowmask.data_pipeline.clip.decode import DecodedClip
from flowmask.data_pipeline.plan.cost import BuildSpeed
from flowmask.data_pipeline.plan.units import BuildPlan
from flowmask.models.errors import DataError
from flowmask.models.text import TextEncoder

_SENTENCES, _SHORT_S = 8, 5.0


def measure(
    plan: BuildPlan,
    *,
    clips: ClipPass,
    free_vae: Callable[[], None],
    text_encoder: Callable[[], TextEncoder],
    dtype: torch.dtype,
    together: int,
) -> BuildSpeed | None:
    """Seconds per pixel, from the first readable clip, and per sentence; None if there is nothing to measure.

    The text encoder stays loaded for the pass that follows; the VAE does not. together: as `encode_sentences`
    """
    decoded = next(_readable(plan, clips), None)
    if decoded is None or not plan.texts:
        return None
    clips.encoder()  # load outside of the measured time
    encode_s = _seconds(lambda: list(clips.encoder().encode([decoded])))
    if encode_s < _SHORT_S:  # the first call also chooses kernels and allocates memory
        encode_s = _seconds(lambda: list(clips.encoder().encode([decoded])))
    pixels = (1 + len(decoded.masks)) * decoded.frames[..., 0].size
    free_vae()
    texts = plan.unit_texts(0)[: _SENTENCES * together]
    encoder = text_encoder()
    embeddings: list[dict[int, Tensor]] = []
    sentences_s = _seconds(lambda: embeddings.extend(encode_sentences(encoder, texts, dtype=dtype, together=together)))
    stored = sum(embedding[LONG_TEXT].nbytes for embedding in embeddings)
    return BuildSpeed(pixels / max(encode_s, 1e-9), sentences_s / len(texts), stored / len(texts))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _readable(plan: BuildPlan, clips: ClipPass) -> Iterator[DecodedClip]:
    """Clips of the first unit that can be read and have a mask."""
    for clip, _ in plan.unit_clips(0) if plan.clip_units else ():
        try:
            decoded = clips.decoded(clip)
        except DataError:
            continue
        if decoded.masks:
            yield decoded
