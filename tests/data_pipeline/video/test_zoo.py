"""Frame i is the i-th picture that a player shows, whatever wrote the file and in whatever order it is read."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from zoo import FILMS, TICKS, Film, number_of, times, write

from flowmask.data_pipeline.video.forward import ForwardReader
from flowmask.data_pipeline.video.seeking import SeekingReader
from flowmask.data_pipeline.video.video_file import VideoFile

SEED = int(os.environ.get("SEED", "0"))
TRIALS = int(os.environ.get("TRIALS", "1"))


def numbers(film: Film, frames: list[np.ndarray]) -> list[int | None]:
    """What the pictures show; a turned one must be turned back to be read."""
    return [number_of(np.rot90(frame, film.turn // 90)) for frame in frames]


def reads(rng: random.Random, count: int) -> list[list[int]]:
    """Ordered, backward, repeated, sparse and random reads, each a list of frame ids."""
    sparse = [sorted(rng.sample(range(count), min(count, 5))) for _ in range(6)]
    backward = [[i] for i in range(count - 1, 0, -7)]
    drawn = [[rng.randrange(count) for _ in range(rng.randint(1, 4))] for _ in range(6)]
    return [list(range(count)), *sparse, *backward, [3, 3, 0, count - 1, 3], *drawn]


@pytest.mark.parametrize("film", FILMS, ids=str)
def test_frame_i_is_the_ith_picture_that_a_player_shows(film: Film, tmp_path: Path) -> None:
    path = tmp_path / film.name
    shown = write(path, film)
    video = VideoFile(path)
    assert len(video) == len(shown)
    height, width = film.size[::-1] if film.turn % 180 else film.size
    assert video.size == (height, width)
    rng = random.Random(SEED)
    for ids in (ids for _ in range(TRIALS) for ids in reads(rng, len(shown))):
        frames = video.frames(ids)
        assert numbers(film, frames) == [shown[i] for i in ids]
        assert {frame.shape for frame in frames} == {(height, width, 3)}


@pytest.mark.parametrize("film", FILMS, ids=str)
def test_all_frames_at_the_rate_last_as_long_as_a_player_shows_them(film: Film, tmp_path: Path) -> None:
    path = tmp_path / film.name
    shown = write(path, film)
    begins = [tick / TICKS / float(film.rate) for tick in times(film)]
    lasts = begins[shown[-1] + 1] - begins[shown[0]]
    rate = VideoFile(path).frames_per_second
    longest = 4 if film.variable else 1  # the last frame's end is not in every container
    assert abs(len(shown) / rate - lasts) <= longest / float(film.rate)
    if not film.variable and shown == list(range(film.frames)):
        assert rate == float(film.rate)


SEEKABLE = [film for film in FILMS if film.name in ("h264.mp4", "h264.mkv", "h264_gop3.mkv", "h264_fragments.mp4")]


@pytest.mark.parametrize("film", SEEKABLE, ids=str)
def test_the_pixels_are_the_same_with_and_without_decord(
    film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / film.name
    write(path, film)
    seeking = VideoFile(path)
    assert isinstance(seeking._reader, SeekingReader), "the rule admits it"
    monkeypatch.setitem(sys.modules, "decord", None)
    forward = VideoFile(path)
    assert isinstance(forward._reader, ForwardReader)
    assert (len(forward), forward.size, forward.frames_per_second) == (
        len(seeking),
        seeking.size,
        seeking.frames_per_second,
    )
    ids = [30, 2, 59, 17]
    for ours, theirs in zip(forward.frames(ids), seeking.frames(ids), strict=True):
        np.testing.assert_array_equal(ours, theirs)
