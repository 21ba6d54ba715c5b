"""A clip's frames follow the reference's rule; each draw depends on its generator alone."""

from random import Random

import pytest
from trials import SEED, TRIALS

from flowmask.data_pipeline.clip.frames import anchor_frames, sparse_frames


def check(trials: int, seed: int) -> None:
    rng = Random(seed)
    for _ in range(trials):
        length, frames = rng.randint(1, 120), rng.choice([3, 4, 5, 9, 17, 33])
        anchor = rng.randrange(length)
        ids = sparse_frames(rng, anchor=anchor, length=length, frames=frames)
        assert len(ids) == frames and ids == sorted(ids) and anchor in ids
        assert ids[0] >= 0 and ids[-1] < length
        assert any(max(0, anchor - d) in ids for d in (1, 2, 3))
        assert any(min(length - 1, anchor + d) in ids for d in (1, 2, 3))
        if length >= frames + 6:  # enough frames outside the neighbours: only the ends can repeat
            assert len(set(ids)) >= frames - 2, (anchor, length, ids)


def test_a_clip_holds_its_anchor_and_a_near_frame_on_each_side() -> None:
    check(2000, seed=0)


@pytest.mark.long
def test_a_clip_holds_its_anchor_at_length() -> None:
    check(100000 * TRIALS, seed=SEED)


def test_the_draw_is_a_function_of_the_generator() -> None:
    first, second = (sparse_frames(Random(7), anchor=20, length=90, frames=17) for _ in range(2))
    assert first == second != sparse_frames(Random(8), anchor=20, length=90, frames=17)


@pytest.mark.parametrize(("frames", "count"), [(1, 1), (2, 3), (3, 3)])
def test_very_short_clips_are_the_anchor_and_its_neighbours(frames: int, count: int) -> None:
    ids = sparse_frames(Random(0), anchor=10, length=50, frames=frames)
    assert len(ids) == count and 10 in ids and all(abs(i - 10) <= 3 for i in ids)


def test_a_video_of_one_frame_is_repeated() -> None:
    assert sparse_frames(Random(0), anchor=0, length=1, frames=17) == [0] * 17


def test_anchors_step_by_the_clip_length() -> None:
    assert list(anchor_frames(40, 17)) == [0, 17, 34] and list(anchor_frames(17, 17)) == [0]
    assert list(anchor_frames(1, 17)) == [0]
