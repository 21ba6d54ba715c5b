"""Frame i is the i-th picture that a player shows, for files of any writer, read in any order."""

import importlib.util
import random
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from trials import SEED, TRIALS
from zoo import FILMS, TICKS, Film, drawn, number_of, times, write

from flowmask.data_pipeline.video.packets import facts_of
from flowmask.data_pipeline.video.seeking import seeking_reader
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import DataError


def numbers(film: Film, frames: list[np.ndarray]) -> list[int | None]:
    """The numbers in the pictures; a turned picture is turned back before it is read."""
    return [number_of(np.rot90(frame, film.turn // 90)) for frame in frames]


def reads(rng: random.Random, count: int) -> list[list[int]]:
    """Ordered, backward, repeated, sparse and random reads, each a list of frame ids."""
    sparse = [sorted(rng.sample(range(count), min(count, 5))) for _ in range(6)]
    backward = [[i] for i in range(count - 1, 0, -7)]
    drawn = [[rng.randrange(count) for _ in range(rng.randint(1, 4))] for _ in range(6)]
    return [list(range(count)), *sparse, *backward, [count // 2, count // 2, 0, count - 1, count // 2], *drawn]


@pytest.mark.parametrize("film", FILMS, ids=str)
def test_frame_i_is_the_ith_picture_that_a_player_shows(film: Film, tmp_path: Path) -> None:
    path = tmp_path / film.name
    shown = write(path, film)
    video = VideoFile(path)
    assert len(video) == len(shown)
    height, width = film.size[::-1] if film.turn % 180 else film.size
    assert video.size == (height, width)
    rng = random.Random(SEED)
    for ids in reads(rng, len(shown)):
        frames = video.frames(ids)
        assert numbers(film, frames) == [shown[i] for i in ids]
        assert {frame.shape for frame in frames} == {(height, width, 3)}
    assert_seeks_are_right(path, film, shown, rng)


def assert_seeks_are_right(path: Path, film: Film, shown: list[int], rng: random.Random) -> bool:
    """Where decord may read the file, every single read by decord is right; return whether it may."""
    seeking = seeking_reader(path, facts_of(path))
    for ids in reads(rng, len(shown)) if seeking else []:
        some = sorted(set(ids))
        assert numbers(film, seeking.frames(some)) == [shown[i] for i in some]
    return seeking is not None


def shown_whole(path: Path) -> bool:
    """Whether FFmpeg recognises and decodes a file completely; with a .ts of a few packets it often fails."""
    try:
        with av.open(str(path)) as container:
            return not any(frame.is_corrupt for frame in container.decode(video=0))
    except av.FFmpegError:
        return False


@pytest.mark.long
def test_drawn_films_of_any_codec_container_and_cut_are_read_right(tmp_path: Path) -> None:
    admitted = unwritten = 0
    for trial in range(300 * TRIALS):
        rng = random.Random(f"{SEED} {trial}")
        film = drawn(rng, trial)
        path = tmp_path / film.name
        try:
            shown = write(path, film)
        except av.FFmpegError:  # the muxer refuses the film, for example a cut that is too short
            unwritten += 1
            continue
        if shown and not shown_whole(path):
            unwritten += 1
            with pytest.raises(DataError, match=r"no readable video|truncated or damaged"):
                len(VideoFile(path))
            continue
        if shown:  # a cut can end before its first shown picture
            video = VideoFile(path)
            assert len(video) == len(shown), film
            for ids in reads(rng, len(shown)):
                assert numbers(film, video.frames(ids)) == [shown[i] for i in ids], film
            admitted += assert_seeks_are_right(path, film, shown, rng)
        path.unlink()
    assert unwritten < 30 * TRIALS
    assert admitted > 10 * TRIALS or importlib.util.find_spec("decord") is None


@pytest.mark.parametrize("film", FILMS, ids=str)
def test_all_frames_at_the_rate_last_as_long_as_a_player_shows_them(film: Film, tmp_path: Path) -> None:
    path = tmp_path / film.name
    shown = write(path, film)
    begins = [tick / TICKS / float(film.rate) for tick in times(film)]
    lasts = begins[shown[-1] + 1] - begins[shown[0]]
    rate = VideoFile(path).frames_per_second
    longest = 4 if film.variable else 1  # not every container holds the end of the last frame
    assert abs(len(shown) / rate - lasts) <= longest / float(film.rate)
    if not film.variable and shown == list(range(film.frames)):
        assert rate == float(film.rate)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264_gop3.mkv", "h264_fragments.mp4"])
def test_the_pixels_are_the_same_with_and_without_decord(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("decord", exc_type=ImportError)
    path = tmp_path / name
    write(path, next(film for film in FILMS if film.name == name))
    ids, facts = [2, 17, 30, 59], facts_of(path)
    seeking = seeking_reader(path, facts)
    assert seeking is not None, "the rule admits it"
    quick = seeking.frames(ids)
    monkeypatch.setitem(sys.modules, "decord", None)
    assert seeking_reader(path, facts) is None
    video = VideoFile(path)
    assert len(video) == 60
    for ours, theirs in zip(video.frames(ids), quick, strict=True):
        np.testing.assert_array_equal(ours, theirs)
