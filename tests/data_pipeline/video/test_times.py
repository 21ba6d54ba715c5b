"""The picture on the screen at a given time, compared with FFmpeg's fps filter and with the film's making."""

import itertools
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import pytest
from av.filter import Graph
from hypothesis import given, seed, settings
from hypothesis.strategies import DataObject, data, integers, lists, none, one_of
from trials import SEED, TRIALS
from zoo import FILMS, TICKS, Film, drawn, number_of, times, write

from flowmask.data_pipeline.video.times import exact_rate, show_times
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import DataError

RATES = (Fraction(1), Fraction(7), Fraction(10), Fraction(25, 2), Fraction(24000, 1001), Fraction(60))
TIMED = (
    *("h264.mp4", "h264.ts", "h264_cut.mp4", "h264_open_cut.ts", "h264_fragments.mp4", "hevc_cut.mov", "picture.gif"),
    *("h264_variable.mp4", "h264_variable.mov", "h264_variable.mkv", "h264_variable.flv", "h264_variable.ts"),
    *("vp9_variable.webm", "ntsc.mkv", "ntsc.mp4", "mpeg2.mpg", "wmv.asf", "h264_interlaced.mkv"),
)
_CLOCK = 2_880_000  # one second, in a unit that the units of all containers divide
_EARLY_S = Fraction(1, 1000)  # containers round times: a picture is due this little before its time


def _by_ffmpeg(path: Path, rates: tuple[Fraction, ...]) -> list[list[int | None]]:
    """The numbers of the pictures that FFmpeg shows at each rate, a little early."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        numbers = {frame.pts: number_of(frame.to_ndarray(format="rgb24")) for frame in frames}
        if not frames[-1].duration:  # fragments lack the last frame's duration: take it from the rate
            frames[-1].duration = round(1 / (stream.average_rate * stream.time_base))
        found = []
        for rate in rates:
            graph = Graph()
            early = f"PTS-STARTPTS-{_CLOCK * _EARLY_S}"
            fps = f"fps={rate.numerator}/{rate.denominator}:round=up"
            chain = [("settb", f"1/{_CLOCK}"), ("setpts", early), ("fps", fps), ("buffersink", None)]
            source = graph.add_buffer(template=stream, time_base=stream.time_base)
            graph.link_nodes(source, *(graph.add(*node) for node in chain)).configure()
            shown, pending = [], [*frames, None]
            for frame in pending:
                graph.push(frame)
                while (pulled := _pulled(graph)) is not None:
                    shown.append(number_of(pulled.to_ndarray(format="rgb24")))
            found.append(shown)
    assert None not in numbers.values()
    return found


def _pulled(graph: Graph) -> av.VideoFrame | None:
    try:
        frame = graph.pull()
    except (av.BlockingIOError, av.EOFError):
        return None
    assert isinstance(frame, av.VideoFrame)
    return frame


def _ours(path: Path, shown: list[int], rate: Fraction) -> list[int]:
    return [shown[place] for place in VideoFile(path).times.shown_at(rate)]


@pytest.mark.parametrize("name", TIMED)
def test_a_slower_player_shows_what_ffmpegs_filter_shows(name: str, tmp_path: Path) -> None:
    film = next(film for film in FILMS if film.name == name)
    shown = write(tmp_path / name, film)
    for rate, theirs in zip(RATES, _by_ffmpeg(tmp_path / name, RATES)):
        assert _ours(tmp_path / name, shown, rate) == theirs, rate


def _true(film: Film, shown: list[int], rate: Fraction) -> list[int]:
    """The pictures on the screen by the times that the film was made with, a little early."""
    clock = 1 / (film.rate * TICKS)
    begins = [(times(film)[number] - times(film)[shown[0]]) * clock for number in shown]
    end = (times(film)[shown[-1] + 1] - times(film)[shown[0]]) * clock
    ticks = [tick / rate + _EARLY_S for tick in range(1000) if tick / rate + _EARLY_S < end]
    return [max(number for number, begin in zip(shown, begins) if begin <= tick) for tick in ticks]


@pytest.mark.parametrize("name", ["h264.avi", "mpeg4_b.avi", "h264.h264", "h264.flv", "h264_variable.mp4", "hevc.mp4"])
def test_a_slower_player_shows_the_film_as_it_was_made(name: str, tmp_path: Path) -> None:
    """Also where the container has no times, or only decoding times."""
    film = next(film for film in FILMS if film.name == name)
    shown = write(tmp_path / name, film)
    for rate in (Fraction(1), Fraction(7), Fraction(25, 2)):
        assert _ours(tmp_path / name, shown, rate) == _true(film, shown, rate), rate


def test_the_rate_of_the_film_shows_each_picture_once(tmp_path: Path) -> None:
    for name in ("h264.mp4", "ntsc.mkv", "ntsc.mp4", "h264.flv", "h264.avi", "picture.gif"):
        film = next(film for film in FILMS if film.name == name)
        shown = write(tmp_path / name, film)
        video = VideoFile(tmp_path / name)
        assert video.times.shown_at(exact_rate(video.frames_per_second)) == list(range(len(shown))), name


def _rises(path: Path) -> bool:
    """Whether all times of a file rise; FFmpeg's filter drops pictures of others. Its muxer for mpg repeats a time."""
    with av.open(str(path)) as container:
        times = [frame.pts for frame in container.decode(video=0)]
    return None not in times and all(one < other for one, other in itertools.pairwise(times))  # type: ignore[operator]


@pytest.mark.parametrize("later_s", [0, 1000])
@pytest.mark.parametrize("name", ["h264.ts", "mpeg2.mpg", "h264_variable.ts"])
def test_recordings_joined_to_one_file_are_shown_one_after_the_other_at_their_rate(
    name: str, later_s: int, tmp_path: Path
) -> None:
    film = next(film for film in FILMS if film.name == name)
    later = replace(film, muxer={**film.muxer, "output_ts_offset": f"{later_s}"})
    paths = [tmp_path / "first" / name, tmp_path / "then" / name, tmp_path / "joined" / name]
    for path in paths:
        path.parent.mkdir()
    count = len(write(paths[0], film))
    write(paths[1], later)
    paths[2].write_bytes(paths[0].read_bytes() + paths[1].read_bytes() + paths[0].read_bytes())
    alone, joined = VideoFile(paths[0]), VideoFile(paths[2])
    assert len(joined) == 3 * count and joined.frames_per_second == pytest.approx(alone.frames_per_second)
    for part in (0, count, 2 * count):
        begins = joined.times.begins[part : part + count]
        assert [begin - begins[0] for begin in begins] == list(alone.times.begins)
        assert part == 0 or 0 < begins[0] - joined.times.begins[part - 1] < 2 * alone.times.end / count


@settings(max_examples=50 * TRIALS)
@seed(SEED)
@given(data())
def test_a_wrong_or_missing_time_changes_that_of_no_other_picture(drawn: DataObject) -> None:
    gaps = drawn.draw(lists(integers(30, 50), min_size=6, max_size=30))
    right = [1000, *itertools.accumulate(gaps, initial=1000 + 40)]
    wrong = drawn.draw(integers(1, len(right) - 2))
    stated: list[int | None] = list(right)
    stated[wrong] = drawn.draw(one_of(none(), integers(0, 3000).filter(lambda time: time != right[wrong + 1])))
    found = show_times(stated, unit_s=Fraction(1, 1000), last=40, rate=25.0).begins
    kept = [begin + 1000 for number, begin in enumerate(found) if number != wrong]
    assert kept == [*right[:wrong], *right[wrong + 1 :]]
    assert right[wrong - 1] < found[wrong] + 1000 < right[wrong + 1]


def _drawn_agree(trials: int, folder: Path) -> None:
    agreed = 0
    for trial in range(trials):
        rng = Random(f"{SEED} {trial}")
        film = drawn(rng, trial)
        path = folder / film.name
        with suppress(av.FFmpegError, DataError):  # the film can't be written, or its cut holds no picture
            shown = write(path, film)
            rate = Fraction(rng.randint(1, 600), rng.choice([10, 11, 13]))
            ours = _ours(path, shown, rate)
            if film.container != "avi" and _rises(path):  # avi has only decoding times
                assert ours == _by_ffmpeg(path, (rate,))[0], (film, rate)
            elif film.container != "avi":
                true = _true(film, shown, rate)
                assert all(abs(one - other) <= 1 for one, other in zip(ours, true, strict=True)), (film, rate)
            agreed += 1
    assert agreed > 0.8 * trials


def test_drawn_films_at_drawn_rates_are_shown_as_ffmpegs_filter_shows_them(tmp_path: Path) -> None:
    _drawn_agree(12, tmp_path)


@pytest.mark.long
def test_many_drawn_films_at_drawn_rates_are_shown_as_ffmpegs_filter_shows_them(tmp_path: Path) -> None:
    _drawn_agree(200 * TRIALS, tmp_path)
