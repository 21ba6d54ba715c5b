"""A file that is no whole video is refused in one line before other files are opened; its rest is read on request."""

import gc
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from trials import SEED
from zoo import FILMS, Film, number_of, write

from flowmask.data_pipeline.video import opening
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import DataError

NAMED = {film.name: film for film in FILMS}


def film(folder: Path, name: str = "h264.mp4") -> Path:
    """Write the film of that name."""
    write(folder / name, NAMED[name])
    return folder / name


def refusal(path: Path) -> str:
    """The one line of a file's refusal."""
    with pytest.raises(DataError) as raised:
        len(VideoFile(path))
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < len(str(path)) + 300
    return said


def sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        silence.rate = 44100
        file.mux(stream.encode(silence))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {secret}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        '<Representation id="0" mimeType="video/mp4"><BaseURL>{secret}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
        "[playlist]\nFile1={secret}\n",
        '<smil><body><video src="{secret}"/></body></smil>',
        "[Reference]\nRef1=file://{secret}\n",
        "#!/usr/bin/env flowmask\n",
    ],
    ids=["hls", "concat", "sdp", "dash", "pls", "smil", "asf reference", "text"],
)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "mkv"])
def test_a_file_that_names_others_opens_none_of_them(text: str, suffix: str, tmp_path: Path) -> None:
    secret = film(tmp_path)
    os.utime(secret, (1, 1))
    (tmp_path / f"list.{suffix}").write_text(text.format(secret=secret))
    assert "no readable video" in refusal(tmp_path / f"list.{suffix}")
    assert secret.stat().st_atime == 1


def test_pictures_sound_and_what_is_no_file_are_refused_by_their_kind(tmp_path: Path) -> None:
    from PIL import Image

    for kind in ("png", "jpg", "bmp"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"picture.{kind}")
        (tmp_path / f"{kind}.mp4").write_bytes((tmp_path / f"picture.{kind}").read_bytes())
        assert "not a video format" in refusal(tmp_path / f"{kind}.mp4")
    sound(tmp_path / "sound.mp4")
    assert "holds no video, only audio" in refusal(tmp_path / "sound.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "pipe, socket or device" in refusal(tmp_path / "pipe.mp4")
    assert "pipe, socket or device" in refusal(Path("/dev/zero"))
    assert "a folder" in refusal(tmp_path)
    assert "no such video file" in refusal(tmp_path / "none.mp4")
    assert "no such video file" in refusal(tmp_path / "none.mp4" / "x.mp4")
    assert "too long" in refusal(tmp_path / ("x" * 300))
    (tmp_path / "empty.mp4").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.mp4")
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    assert "no readable video" in refusal(tmp_path / "zeros.mp4")


@pytest.mark.parametrize("name", ["http:x.mp4", "concat:a|b.mp4", "pipe:0.mp4", "%05d.mp4", "-i.mp4", "ü 視頻\n.mp4"])
def test_a_name_is_only_a_name(name: str, tmp_path: Path) -> None:
    path = film(tmp_path).rename(tmp_path / name)
    assert len(VideoFile(path)) == 60
    assert number_of(VideoFile(path).frames([57])[0]) == 57


def test_fragments_that_are_cut_around_their_boxes_are_missed_and_those_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "h264_fragments.mp4"
    write(path, NAMED[path.name])
    whole = path.read_bytes()
    boxes = [found.start() - 4 for found in re.finditer(b"moof|mdat", whole)][2:]  # after the first fragment
    for box in boxes:
        for at in range(box, box + 12):
            path.write_bytes(whole[:at])
            if not any(whole[box:at]) and whole[box + 4 : box + 8] == b"moof":
                assert len(VideoFile(path)) % 12 in (0, 6), at  # the file ends with a whole fragment: no sign of more
                continue
            assert "data.allow_truncated" in refusal(path), at
            video = VideoFile(path, allow_truncated=True)
            shown = [number_of(frame) for frame in video.frames(range(len(video)))]
            assert shown == list(range(len(shown))), at


@pytest.mark.parametrize("name", ["h264.avi", "mpeg4.avi", "h264_sound.avi"])
def test_an_avi_that_is_cut_in_its_index_has_all_frames_or_is_refused_and_one_cut_in_the_last_frame_is_missed(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, NAMED[name])
    whole, rng = path.read_bytes(), np.random.default_rng(SEED)
    with av.open(str(path)) as file:
        last = [packet for packet in file.demux(video=0) if packet.size][-1]
    assert last.pos is not None
    index = whole.rindex(b"idx1")
    for at in (index, index + 8, *rng.integers(index + 8, len(whole), 20)):
        path.write_bytes(whole[:at])
        try:
            video = VideoFile(path)
            assert [number_of(frame) for frame in video.frames(range(len(video)))] == list(range(60)), at
        except DataError as error:
            assert "sound" in name and "data.allow_truncated" in str(error)  # FFmpeg needs the index for two streams
    for at in rng.integers(last.pos + 1, last.pos + last.size, 4):
        path.write_bytes(whole[:at])
        assert "data.allow_truncated" in refusal(path), at


# Its index is in front, as on the web, so that a cut file still opens.
FASTSTART = Film("faststart.mp4", "libx264", options=NAMED["h264.mp4"].options, muxer={"movflags": "faststart"})
CUT_SHORT = (
    *("h264.mkv", "vp9.webm", "av1.webm", "h264.avi", "mpeg4.avi", "h264.flv", "h264_fragments.mp4", "wmv.asf"),
    *("picture.gif", FASTSTART.name),
)


@pytest.mark.parametrize("name", CUT_SHORT)
@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_a_file_that_lost_its_end_is_refused_and_what_is_left_is_read_when_allowed(
    name: str, share: float, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, NAMED.get(name, FASTSTART))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    said = refusal(path)
    if "can be read" not in said:  # not even its beginning can be read
        assert "no readable video, or a truncated one" in said
        return
    assert "data.allow_truncated" in said
    read = int(said.partition("damaged: ")[2].split()[0])
    video = VideoFile(path, allow_truncated=True)
    assert len(video) == read <= 60
    shown = [number_of(frame) for frame in video.frames(range(read))]
    sound = max(0, read - 8)
    assert shown[:sound] == list(range(sound))  # later, pictures that need lost ones are missing
    with pytest.raises(DataError, match=f"frame {read + 8} was requested"):
        video.frames([read + 8])


def test_the_refusal_says_how_many_frames_are_left_of_how_many(tmp_path: Path) -> None:
    for whole in (FASTSTART, NAMED["h264.mkv"]):
        path = tmp_path / whole.name
        write(path, whole)
        path.write_bytes(path.read_bytes()[:-1500])
        words = refusal(path).partition("damaged: ")[2].split()
        assert 20 < int(words[0]) < 60 and abs(int(words[2]) - 60) <= 3


def test_pictures_too_large_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path)
    monkeypatch.setattr(opening, "MAX_PIXELS", 6399)
    assert "100x64 px" in refusal(path)


def test_a_header_that_names_more_frames_than_the_file_has_bytes_is_refused(tmp_path: Path) -> None:
    for name, table, place in (("h264.mp4", b"stsz", 12), ("h264_fragments.mp4", b"trun", 8)):
        path = film(tmp_path, name)
        content = bytearray(path.read_bytes())
        at = content.index(table) + place
        content[at : at + 4] = (1 << 28).to_bytes(4)
        path.write_bytes(content)
        assert "names 268,435,456 frames" in refusal(path)


def test_a_size_that_changes_within_a_video_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.ts"
    for number, size in enumerate([(64, 100), (80, 120)]):
        write(tmp_path / f"{number}.ts", Film("x.ts", "mpeg2video", frames=20, size=size, options={"g": "12"}))
    path.write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    video = VideoFile(path)
    assert number_of(video.frames([5])[0]) == 5
    with pytest.raises(DataError, match="frame 35 has 80x120 px"):
        video.frames([35])


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4"])
def test_threads_share_a_video(name: str, tmp_path: Path) -> None:
    video = VideoFile(film(tmp_path, name))
    wrong: list[int] = []

    def read(first: int) -> None:
        for i in range(first, 60, 7):
            wrong.extend([i] * (number_of(video.frames([i])[0]) != i or len(video) != 60))

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_video_that_is_let_go_leaves_no_file_open(tmp_path: Path) -> None:
    good, cut = film(tmp_path), film(tmp_path, "h264.mkv")
    cut.write_bytes(cut.read_bytes()[:-1500])
    gc.collect()
    before = handles()
    gc.disable()
    try:
        for _ in range(20):
            VideoFile(good).frames([3, 50])
            video = VideoFile(good)
            video.frames([55])
            video.frames([1, 2])
            refusal(cut)
        del video
        assert handles() <= before
    finally:
        gc.enable()


_OPEN_AT_THE_END = """
import os, sys
from pathlib import Path
from flowmask.data_pipeline.video import forward
pictures = forward._pictures(Path(sys.argv[1]))
next(pictures)
os.kept, os.module = pictures, forward  # freed when the module is empty already, as of a cache of open videos
del pictures
"""


def test_a_video_that_is_open_when_python_ends_says_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OPEN_AT_THE_END, str(film(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
