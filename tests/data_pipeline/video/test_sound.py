"""The sound of overlay videos: in step with the pictures, cut with them, copied unchanged where an mp4 allows it."""

from pathlib import Path

import av
import numpy as np
import pytest
from claps import CLAPS, SIZE, heard, packets, seen, span_s, write_claps

from flowmask.data_pipeline.video.sound import soundtrack_of
from flowmask.data_pipeline.video.times import exact_rate
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.data_pipeline.video.writing import VideoWriter

COPIED = [
    *(("mp4", codec) for codec in ("aac", "libmp3lame", "ac3", "alac", "flac")),
    *(("mkv", codec) for codec in ("libopus", "flac", "eac3", "mp2")),
    *(("mov", "aac"), ("webm", "libopus"), ("ts", "aac"), ("ts", "mp2"), ("flv", "aac")),
]
ENCODED = [("mov", "pcm_s16le"), ("avi", "pcm_s16le"), ("mkv", "vorbis"), ("asf", "wmav2")]
_STEP_S = 0.03  # limit in s between a sound and its picture


def _overlay(source: Path, path: Path, *, fps: float | None = None, seconds: float | None = None) -> Path:
    """The pictures of a film at the given rate and length, with its sound."""
    video = VideoFile(source)
    rate = video.frames_per_second if fps is None else fps
    ids = range(len(video)) if fps is None else video.times.shown_at(exact_rate(fps))
    ids = ids[: None if seconds is None else round(seconds * rate)]
    sound = soundtrack_of(source, video.times)
    assert sound is not None
    with VideoWriter(path, height=SIZE[0], width=SIZE[1], fps=rate, sound=sound) as writer:
        for number in ids:
            writer.add(video.frames([number])[0])
    assert writer.sound_problem == ""
    return path


def _codec(path: Path) -> str:
    with av.open(str(path)) as file:
        name: str = file.streams.audio[0].codec_context.codec.canonical_name
        return name.replace("mp2", "mp3")  # an mp4 names both the same


@pytest.mark.parametrize(("container", "codec"), [*COPIED, *ENCODED])
def test_sound_is_heard_when_its_picture_is_seen_and_stored_as_it_was_where_an_mp4_can_hold_it(
    container: str, codec: str, tmp_path: Path
) -> None:
    source = tmp_path / f"source.{container}"
    write_claps(source, codec)
    made = _overlay(source, tmp_path / "o.mp4")
    assert len(seen(made)) == len(heard(made)) == len(CLAPS)
    assert np.abs(np.subtract(seen(made), heard(made))).max() < _STEP_S
    assert _codec(made) == (_codec(source) if (container, codec) in COPIED else "aac")
    if (container, codec) in COPIED and container != "ts":  # packets of ts have headers that those of mp4 do not have
        stored = packets(source)
        assert packets(made) == stored[: len(packets(made))]
    assert 0 <= span_s(made, "video") - span_s(made, "audio") + 0.15 < 0.3


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
@pytest.mark.parametrize(
    "times", [{"video_from_s": 0.5}, {"sound_from_s": 0.7}, {"video_from_s": 0.3, "sound_from_s": 0.6}], ids=str
)
def test_pictures_or_sound_that_begin_late_stay_in_step(codec: str, times: dict[str, float], tmp_path: Path) -> None:
    source = tmp_path / f"source.{'mov' if codec == 'pcm_s16le' else 'mp4'}"
    write_claps(source, codec, **times)
    made = _overlay(source, tmp_path / "o.mp4")
    assert len(seen(made)) == len(CLAPS)
    assert np.abs(np.subtract(seen(source), seen(made))).max() < 1e-3
    assert np.abs(np.subtract(seen(made), heard(made))).max() < _STEP_S


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_fewer_and_slower_pictures_have_the_sound_of_their_span(codec: str, tmp_path: Path) -> None:
    source = tmp_path / f"source.{'mov' if codec == 'pcm_s16le' else 'mp4'}"
    write_claps(source, codec, video_from_s=0.2)
    made = _overlay(source, tmp_path / "o.mp4", fps=5, seconds=2)
    assert (len(seen(made)), len(heard(made))) == (1, 1)
    assert abs(seen(made)[0] - heard(made)[0]) < _STEP_S
    assert span_s(made, "video") == pytest.approx(2)
    assert 1.95 < span_s(made, "audio") < 2.05


@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_sound_of_recordings_joined_to_one_file_stays_with_its_pictures(codec: str, tmp_path: Path) -> None:
    for name, late_s in (("one.ts", 0.5), ("other.ts", 0.0)):  # the second clock begins before the first one
        write_claps(tmp_path / name, codec, video_from_s=late_s, sound_from_s=late_s)
    (tmp_path / "source.ts").write_bytes(b"".join((tmp_path / name).read_bytes() for name in ("one.ts", "other.ts")))
    made = _overlay(tmp_path / "source.ts", tmp_path / "o.mp4")
    assert len(seen(made)) == len(heard(made)) == len(seen(tmp_path / "one.ts")) + len(CLAPS)
    assert np.abs(np.subtract(seen(made), heard(made))).max() < _STEP_S


def test_a_film_without_sound_has_none_and_its_mp4_is_as_it_was(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "mute.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((*SIZE, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    video = VideoFile(tmp_path / "mute.mp4")
    assert soundtrack_of(tmp_path / "mute.mp4", video.times) is None
