"""Chooses the frames of a training clip: anchor frames, and a sparse draw around each.

Pure: every draw comes from the caller's generator.
"""

from random import Random

_MAX_NEIGHBOUR_DISTANCE = 3
_DENSE = 3


def anchor_frames(length: int, frames: int) -> range:
    """Start frames of a video's clips: 0, frames, 2 frames, ... below `length`."""
    return range(0, length, frames)


def sparse_frames(rng: Random, *, anchor: int, length: int, frames: int) -> list[int]:
    """Sorted frame indices of a clip: the anchor, one 1-3 frames before it, one 1-3 after, the rest anywhere.

    Neighbours stop at the ends of the video, so the anchor may occur twice; a video shorter than the clip
    repeats frames. The rest avoids the frames between the neighbours if possible. `frames` = 1 gives only the
    anchor; 2 gives three, as 3 does (the caller keeps the first two). Draw order: before, after, rest.
    """
    before, after = (rng.randint(1, _MAX_NEIGHBOUR_DISTANCE) for _ in range(2))
    if frames == 1:
        return [anchor]
    dense = [anchor, max(0, anchor - before), min(length - 1, anchor + after)]
    needed = max(0, frames - _DENSE)
    outside = [*range(min(dense)), *range(max(dense), length)]
    if len(outside) > needed:
        rest = [outside[i] for i in rng.sample(range(len(outside)), needed)]
    elif length >= needed:
        rest = rng.sample(range(length), needed)
    else:
        rest = [rng.randrange(length) for _ in range(needed)]
    return sorted(dense + rest)
