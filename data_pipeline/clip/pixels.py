"""Frames and masks to the VAE's input tensors: size rules, resizing, normalisation, padding in time.

Sizes are (width, height) in pixels. A frame is resized on uint8 by PIL, a mask by nearest source pixel. Only
functions that make tensors import torch: planning needs only the sizes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowmask.models.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

PixelNorm = Literal["half", "imagenet"]
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_TEMPORAL_STRIDE = 4


def short_side_size(w: int, h: int, *, short_side: int, long_side: int | None) -> tuple[int, int]:
    """Size whose short side is `short_side`, or less if the long side would exceed `long_side`; not snapped."""
    short, long = min(w, h), max(w, h)
    if long_side is not None and long / short * short_side > long_side:
        short_side = round(long_side * short / long)
    other = int(short_side * long / short)
    return (short_side, other) if w < h else (other, short_side)


def train_size(w: int, h: int, *, short_side: int, long_side: int | None, multiple: int) -> tuple[int, int]:
    """Training size: `short_side_size`, both sides floored to `multiple`. DataError if one would be 0."""
    scaled = short_side_size(w, h, short_side=short_side, long_side=long_side)
    return _snapped(scaled, multiple=multiple, original=(w, h))


def eval_size(w: int, h: int, *, height: int, width: int, multiple: int) -> tuple[int, int]:
    """Evaluation size of a w x h frame: the largest of its shape inside the box `width` x `height`, floored.

    It may exceed the original. DataError if a side would be 0, as for a very long and thin frame.
    """
    ratio = min(height / h, width / w)
    return _snapped((int(w * ratio), int(h * ratio)), multiple=multiple, original=(w, h))


def _snapped(scaled: tuple[int, int], *, multiple: int, original: tuple[int, int]) -> tuple[int, int]:
    width, height = (side // multiple * multiple for side in scaled)
    if not width or not height:
        raise DataError(
            f"a frame of {original[0]}x{original[1]} would become {width}x{height}: too thin for sides "
            f"in multiples of {multiple}; leave it out or crop it"
        )
    return width, height


def resize_frame(frame: NDArray[np.uint8], *, size: tuple[int, int]) -> NDArray[np.uint8]:
    """rgb8 [H W 3] to `size` (width, height) by PIL's bilinear filter, on uint8."""
    if (frame.shape[1], frame.shape[0]) == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))


def to_signed(frames: Sequence[NDArray[np.uint8]], *, pixel_norm: PixelNorm = "half") -> "Tensor":
    """rgb8 frames [H W 3] of one size to float32 [3 F H W]: (x/255 - mean) / deviation."""
    import torch

    return batch_to_signed(torch.from_numpy(np.stack(frames))[None], pixel_norm=pixel_norm)[0]


def batch_to_signed(frames: "Tensor", *, pixel_norm: PixelNorm = "half") -> "Tensor":
    """rgb8 [B F H W 3] to float32 [B 3 F H W] on the same device: (x/255 - mean) / deviation."""
    import torch

    from flowmask.models.device import to_device

    mean, std = (to_device(torch.tensor(v).view(3, 1, 1, 1), frames.device) for v in _STATISTICS[pixel_norm])
    return (frames.permute(0, 4, 1, 2, 3).float() / 255 - mean) / std


def from_signed(signed: "Tensor", *, pixel_norm: PixelNorm = "half") -> NDArray[np.uint8]:
    """Float [3 F H W] back to rgb8 [F H W 3]: the inverse of `to_signed`, clipped to the range of 8 bits."""
    import torch

    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in _STATISTICS[pixel_norm])
    scaled = ((signed.float().cpu() * std + mean) * 255).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).numpy()


def resize_masks(masks: NDArray[np.bool_], *, size: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [F H W] to `size` (width, height): output pixel i takes source floor(i * source / output)."""
    width, height = size
    if masks.shape[1:] == (height, width):
        return masks
    import torch
    from torch.nn.functional import interpolate

    resized = interpolate(torch.from_numpy(masks)[None].float(), size=(height, width), mode="nearest")
    return resized[0].numpy() > 0.5


def missing_to_stride(frames: int) -> int:
    """Number of frames missing to the next 4k+1, which the VAE needs."""
    return -(frames - 1) % _TEMPORAL_STRIDE


def pad_to_stride(frames: "Tensor", *, dim: int) -> "Tensor":
    """[... F ...] with the last frame repeated along `dim` up to 4k+1 frames, which the VAE needs."""
    import torch

    missing = missing_to_stride(frames.shape[dim])
    last = frames.narrow(dim, frames.shape[dim] - 1, 1)
    return torch.cat([frames, *[last] * missing], dim=dim)


def check_shape(video: "Tensor", *, multiple: int = 16) -> "Tensor":
    """Float [B C F H W]; sides are raised to a multiple of `multiple` by bilinear resizing where needed."""
    from torch.nn.functional import interpolate

    height, width = (-(-side // multiple) * multiple for side in video.shape[-2:])
    if (height, width) == tuple(video.shape[-2:]):
        return video
    frames = video.transpose(1, 2).flatten(0, 1)
    resized = interpolate(frames, size=(height, width), mode="bilinear", align_corners=False)
    return resized.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)
