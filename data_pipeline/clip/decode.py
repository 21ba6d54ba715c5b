"""A clip's files to its pixels: the VAE's input, and the RLE of the record.

Runs in threads: PIL, numpy and decord release the GIL while they work.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.clip.clips import Clip
from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.sources.base import Video


@dataclass
class DecodedClip:
    """Pixels of one clip at its size; `frames` is empty if no mask is kept."""

    clip: Clip
    frames: NDArray[np.uint8]  # rgb8 [F H W 3]
    masks: dict[int, NDArray[np.bool_]]  # index in clip.masks -> bool [F H W]
    rles: dict[int, list[dict[str, Any]]]  # index in clip.masks -> COCO RLE of each frame
    annotated: dict[int, list[bool]]  # index in clip.masks -> per frame, if some aren't


def decode(clip: Clip, video: Video, *, drop_empty_masks: bool) -> DecodedClip:
    """Read, crop, resize and flip; a frame that occurs twice in the clip is read once. DataError: unreadable.

    The mask of a sentence that names nothing is kept: such a sentence has no object that could be absent.
    """
    unique = sorted(set(clip.frame_ids))
    places = np.searchsorted(unique, clip.frame_ids)
    decoded = DecodedClip(clip, np.empty(0, np.uint8), {}, {}, {})
    for j, anno_ids in enumerate(clip.masks):
        mask = clip.geometry.masks(video.mask(anno_ids, unique))
        if mask.any() or not drop_empty_masks or not anno_ids:
            coded = [rle.encode(frame) for frame in mask]
            decoded.masks[j], decoded.rles[j] = np.ascontiguousarray(mask[places]), [coded[place] for place in places]
            known = video.annotated(anno_ids)
            if known is not None and not {*unique} <= {*known}:
                decoded.annotated[j] = [i in known for i in clip.frame_ids]
    if decoded.masks:
        frames = [clip.geometry.frame(frame) for frame in video.frames(unique)]
        decoded.frames = np.stack([frames[place] for place in places])
    return decoded
