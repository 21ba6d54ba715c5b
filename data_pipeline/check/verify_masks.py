"""A sample of a cache's mask latents, decoded through the VAE and compared with the RLE truth.

Two measures of each, over the whole clip. `iou` compares the decoded mask with the truth (only in annotated frames, if
some are not annotated). `error` is the distance of the stored latent from the truth's latent, encoded again, relative
to the norm of the second. With any VAE, a correct latent only has the error of rounding and batching; a mask moved by
one pixel, or another object's mask, has a larger one. The IoU also shows how well the VAE keeps a mask.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.build.records import Shape, Sidecar
from flowmask.data_pipeline.cache.index import COLUMNS
from flowmask.data_pipeline.check.verify_shard import Storage
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.show.inspect_cache import OnProgress
from flowmask.data_pipeline.show.inspect_examples import overlap, shown
from flowmask.models.stored.sealed import parse_json
from flowmask.models.vae import encode_mask

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

# Relative L2; measured: correct ones <= 0.0053, moved by one pixel >= 0.28 (docs/jobs/cache.md)
LATENT_TOLERANCE = 0.02
IOU_FLOOR = 0.8  # below it the VAE itself loses too much of a mask; the tiny VAE stays above (least 0.83)


@dataclass(frozen=True)
class StoredMask:
    """The place of one mask of a clip in its shard; `shape` is (F, H, W) in px."""

    path: Path
    shape: Shape
    record: tuple[int, int]  # offset, length of its JSON
    mask: int
    latent: int  # offset


@dataclass(frozen=True)
class MaskCheck:
    """One decoded mask; `reason` is empty if the mask agrees with the record."""

    file: Path
    clip: str
    mask: int
    iou: float
    error: float

    @property
    def reason(self) -> str:
        if self.error <= LATENT_TOLERANCE:
            return ""
        return (
            f"clip {self.clip}: the latent of mask {self.mask} is not that of its RLE (IoU {self.iou:.3f}, "
            f"error {self.error:.3f}, at most {LATENT_TOLERANCE:g} is right)"
        )


class MaskSample:
    """A uniform draw of `count` masks from a stream of shards; its memory does not grow with the stream."""

    def __init__(self, count: int, *, seed: int):
        self._count, self._draw, self._seen = count, Random(mix64(seed)), 0
        self.chosen: list[StoredMask] = []

    def offer(self, sidecar: Sidecar, path: Path) -> None:
        """Every distinct mask of a correct shard has the same chance (reservoir sampling)."""
        if not self._count:
            return
        found = {}
        for shape, *values in sidecar.examples:
            row = dict(zip(COLUMNS, values, strict=True))
            found[row["mask_mean"]] = StoredMask(
                path, sidecar.shapes[shape], (row["record"], row["record_length"]), row["mask"], row["mask_mean"]
            )
        for stored in found.values():
            self._seen += 1
            if len(self.chosen) < self._count:
                self.chosen.append(stored)
            elif (place := self._draw.randrange(self._seen)) < self._count:
                self.chosen[place] = stored


def check_masks(
    chosen: Sequence[StoredMask],
    vae: "AutoencoderKLWan",
    *,
    storage: Storage,
    on_progress: OnProgress = lambda *_: None,
) -> list[MaskCheck]:
    """Decode each mask alone."""
    checks = []
    for done, stored in enumerate(sorted(chosen, key=lambda stored: (stored.path, stored.latent))):
        on_progress("masks", done, len(chosen))
        meta, latent = _read(stored, storage)
        where = f"{stored.path}, mask {stored.mask}"
        mask = meta["masks"][stored.mask]
        truth = rle.decode_frames(mask["rle"], size=stored.shape[1:], where=where)
        known = np.asarray(mask.get("annotated", [True] * len(truth)))
        checks.append(
            MaskCheck(
                file=stored.path,
                clip=f"{meta['clip']:08d}_{meta['view']:02d}",
                mask=stored.mask,
                iou=overlap(shown(vae, latent)[known], truth[known]),
                error=distance(latent, expected(vae, truth)),
            )
        )
    on_progress("masks", len(chosen), len(chosen))
    return checks


def expected(vae: "AutoencoderKLWan", truth: NDArray[np.bool_]) -> Tensor:
    """float32 [16 f h w] raw: the truth bool [F H W], encoded again."""
    return encode_mask(vae, torch.from_numpy(truth)[None].to(vae.device))[0].cpu()


def distance(tensor: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference of two tensors of the same shape, relative to the norm of the reference."""
    reference = reference.float()
    return float((tensor.float() - reference).norm() / reference.norm().clamp_min(1e-12))


def _read(stored: StoredMask, storage: Storage) -> tuple[dict[str, Any], Tensor]:
    frames, height, width = stored.shape
    shape = (storage.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8)
    dtype: torch.dtype = getattr(torch, storage.dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    with stored.path.open("rb") as file:
        meta = parse_json(os.pread(file.fileno(), stored.record[1], stored.record[0]))
        content = bytearray(os.pread(file.fileno(), size, stored.latent))
    return meta, torch.frombuffer(content, dtype=dtype).view(shape)
