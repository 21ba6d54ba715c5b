"""Pixels to latents: what a clip's record holds, by the one code that the cache and its tests share.

Clips of one shape go through the VAE together, in batches fixed by the list of clips that is handed in, so
the bytes do not depend on who else works. A non-finite number from an encoder is an error, never stored.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.clips import Clip
from data_pipeline.pixels import PixelNorm, to_signed
from data_pipeline.sources.base import Video
from models.errors import CacheError
from models.vae import encode_mask, encode_moments

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

Result = tuple[Tensor, ...]


@dataclass
class EncodedClip:
    """Moments of one clip, in the stored dtype, on the host; dropped masks are in neither mapping."""

    clip: Clip
    video_mean: Tensor = field(default_factory=lambda: torch.empty(0))  # [16 f h w] raw
    video_logvar: Tensor = field(default_factory=lambda: torch.empty(0))
    mask_means: dict[int, Tensor] = field(default_factory=dict)  # place in clip.masks -> [16 f h w] raw
    mask_pixels: dict[int, NDArray[np.bool_]] = field(default_factory=dict)  # -> [F H W]


class ClipEncoder:
    """The frozen VAE with the settings that shape bytes."""

    def __init__(
        self,
        vae: "AutoencoderKLWan",
        *,
        dtype: torch.dtype,
        pixel_norm: PixelNorm,
        batch_clips: int,
        drop_empty_masks: bool,
    ):
        self.vae, self.dtype, self.pixel_norm = vae, dtype, pixel_norm
        self.batch_clips, self.drop_empty_masks = batch_clips, drop_empty_masks
        if vae.device.type == "cpu":
            _channels_last(vae)

    def encode(
        self, clips: Iterable[tuple[Clip, Video]], *, on_clip: Callable[[], None] = lambda: None
    ) -> list[EncodedClip]:
        """Encode clips in order; one all of whose masks are empty is left out where empty masks are dropped.

        Host memory holds the pixels of at most `batch_clips` clips and masks of each shape at a time.
        """
        videos = _Batches(self._moments, size=self.batch_clips)
        masks = _Batches(self._mask_means, size=self.batch_clips)
        encoded = []
        for clip, video in clips:
            result = EncodedClip(clip, mask_pixels=self._masks(clip, video))
            if result.mask_pixels:
                signed = self._signed(clip, video)
                videos.add(signed, str(clip), lambda moments, r=result: _set_moments(r, moments))  # type: ignore[misc]
                for place, pixels in result.mask_pixels.items():
                    masks.add(
                        torch.from_numpy(pixels),
                        f"{clip}, mask of {','.join(clip.masks[place])}",
                        lambda mean, r=result, j=place: r.mask_means.__setitem__(j, mean[0]),  # type: ignore[misc]
                    )
                encoded.append(result)
            on_clip()
        videos.flush()
        masks.flush()
        return encoded

    def _signed(self, clip: Clip, video: Video) -> Tensor:
        """float32 [3 F H W]; a frame that stands in the clip twice is read and resized once."""
        unique = sorted(set(clip.frame_ids))
        frames = dict(zip(unique, map(clip.geometry.frame, video.frames(unique)), strict=True))
        return to_signed([frames[i] for i in clip.frame_ids], pixel_norm=self.pixel_norm)

    def _masks(self, clip: Clip, video: Video) -> dict[int, NDArray[np.bool_]]:
        """bool [F H W] of each mask that is kept, by its place in clip.masks."""
        unique = sorted(set(clip.frame_ids))
        places = np.searchsorted(unique, clip.frame_ids)
        pixels = (clip.geometry.masks(video.mask(anno_ids, unique))[places] for anno_ids in clip.masks)
        return {
            j: np.ascontiguousarray(mask)
            for j, mask in enumerate(pixels)
            if mask.any() or not self.drop_empty_masks
        }

    def _moments(self, signed: Tensor) -> Result:
        return self._stored(*encode_moments(self.vae, signed.to(self.vae.device)))

    def _mask_means(self, mask: Tensor) -> Result:
        return self._stored(encode_mask(self.vae, mask.to(self.vae.device)))

    def _stored(self, *tensors: Tensor) -> Result:
        return tuple(tensor.to(self.dtype).cpu() for tensor in tensors)


def _set_moments(result: EncodedClip, moments: Result) -> None:
    result.video_mean, result.video_logvar = moments


def _channels_last(vae: nn.Module) -> None:
    """Lay the weights of convolutions out as the CPU's kernels like them: 1.7 times faster, twice in bf16."""
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in vae.modules():
        for kind, memory_format in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=memory_format)


class _Batches:
    """Collects tensors of equal shape and encodes `size` of them at once; each result has its own sink."""

    def __init__(self, encode: Callable[[Tensor], Result], *, size: int):
        self._encode, self._size = encode, size
        self._waiting: dict[torch.Size, list[tuple[Tensor, str, Callable[[Result], None]]]] = {}

    def add(self, tensor: Tensor, name: str, sink: Callable[[Result], None]) -> None:
        waiting = self._waiting.setdefault(tensor.shape, [])
        waiting.append((tensor, name, sink))
        if len(waiting) == self._size:
            self._run(tensor.shape)

    def flush(self) -> None:
        for shape in list(self._waiting):
            self._run(shape)

    def _run(self, shape: torch.Size) -> None:
        batch = self._waiting.pop(shape)
        results = self._encode(torch.stack([tensor for tensor, _, _ in batch]))
        for place, (_, name, sink) in enumerate(batch):
            parts = tuple(result[place].clone(memory_format=torch.contiguous_format) for result in results)
            if not all(part.isfinite().all() for part in parts):
                raise CacheError(f"{name}: the VAE gave a number that is not finite; check its weights")
            sink(parts)
