"""Videos whose pictures show their own number, in many codecs and containers, written by PyAV.

The number in a picture is the truth; a decoder's count is never trusted.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

BITS = 10
TICKS = 4  # ticks of the encoder's clock for each frame of constant rate


@dataclass(frozen=True)
class Film:
    """One file of the zoo.

    cut:      first number that a stream-copied cut shows, and its packets from the keyframe before that number
    variable: frames last one to three times as long as at a constant rate
    turn:     degrees, clockwise, that a player turns the picture by
    """

    name: str  # with the suffix of the container
    codec: str
    frames: int = 60
    size: tuple[int, int] = (64, 100)  # height, width in px
    rate: Fraction = Fraction(25)
    pix_fmt: str = "yuv420p"
    options: Mapping[str, str] = field(default_factory=dict)
    cut: tuple[int, int] | None = None
    variable: bool = False
    turn: int = 0
    aspect: Fraction | None = None
    muxer: Mapping[str, str] = field(default_factory=dict)
    filters: str = ""  # bitstream filters over the encoder's packets
    sound: bool = False  # one second longer than the film

    def __str__(self) -> str:
        return self.name

    @property
    def container(self) -> str:
        """The part after the last dot of the name."""
        return self.name.rpartition(".")[2]


def picture(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """rgb8 [H W 3]: the bits of the number in one row of cells, their complement in the row below, a moving bar."""
    height, width = size
    down, across = np.mgrid[:height, :width]
    pixels = np.stack([60 + 2 * across, 200 - across - down, 90 + 2 * down], axis=-1) % 256
    for bit, (top, left) in _cells(size):
        set_ = number >> bit & 1
        pixels[top : top + height // 4, left : left + width // BITS] = 255 * set_
        pixels[top + height // 4 : top + height // 2, left : left + width // BITS] = 255 * (1 - set_)
    pixels[-max(2, height // 8) :, number * 3 % width :][:, : width // 5] = (250, 250, 40)
    return pixels.astype(np.uint8)


def number_of(pixels: NDArray[np.uint8]) -> int | None:
    """The number that a decoded picture shows, None if it is not readable."""
    height, width = pixels.shape[:2]
    if height < 16 or width // BITS < 5:  # no picture of a film is so small
        return None
    number = 0
    for bit, (top, left) in _cells((height, width)):
        above, below = (
            pixels[row + height // 16 : row + 3 * height // 16, left + 2 : left + width // BITS - 2].mean()
            for row in (top, top + height // 4)
        )
        if abs(above - below) < 90:
            return None
        number |= int(above > below) << bit
    return number


def _cells(size: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    height, width = size
    return ((bit, (height // 8, bit * (width // BITS))) for bit in range(BITS))


def write(path: Path, film: Film) -> list[int]:
    """Write the file; return the numbers in the order in which a player shows them."""
    shown = list(range(film.frames))
    if film.cut is None and not film.filters:
        _encode(path, film)
    else:
        whole = path.with_suffix(".whole")
        _encode(whole, film, format="mpegts" if film.container == "ts" else "mp4")
        shown = _copy(whole, path, film)
        whole.unlink()
    if film.turn and not film.filters:
        _turn(path, film.turn)
    return shown


def times(film: Film) -> list[int]:
    """The begin of each frame, in ticks of 1 / (TICKS x rate) s, and the end of the last frame."""
    lengths = [TICKS * (1 + number * 7 % 3 if film.variable else 1) for number in range(film.frames)]
    return [sum(lengths[:number]) for number in range(film.frames + 1)]


@contextmanager
def own_priority() -> Iterator[None]:
    """Restore the thread's priority: as root, SVT-AV1 gives it real-time priority, which later threads inherit."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@own_priority()
def _encode(path: Path, film: Film, *, format: str | None = None) -> None:
    with av.open(str(path), "w", format=format, options=dict(film.muxer)) as file:
        stream = file.add_stream(film.codec, rate=film.rate)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = film.size
        stream.pix_fmt = film.pix_fmt
        stream.options = dict(film.options)
        context = stream.codec_context
        context.thread_count = 1
        if film.aspect is not None:
            context.sample_aspect_ratio = film.aspect
        sound = file.add_stream("aac", rate=44100, layout="mono") if film.sound else None
        clock = 1 / (film.rate * TICKS) if film.variable else 1 / film.rate
        context.time_base = clock
        reformatter = VideoReformatter()
        for number, begins in zip(range(film.frames), times(film)):
            frame = av.VideoFrame.from_ndarray(picture(number, film.size), format="rgb24")
            frame = reformatter.reformat(frame, format=film.pix_fmt, threads=1)
            frame.pts, frame.time_base = (begins if film.variable else number), clock
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            silence = np.zeros((1, round(44100 * (1 + film.frames / film.rate))), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.rate = 44100
            file.mux(sound.encode(frame))
            file.mux(sound.encode(None))


def _copy(whole: Path, path: Path, film: Film) -> list[int]:
    """Copy packets without decoding, as a cut does: from the keyframe before the first number.

    In mp4 and mov an edit list hides the pictures before the first number; other containers show them.
    """
    with av.open(str(whole)) as source, av.open(str(path), "w", options=dict(film.muxer)) as file:
        stream = source.streams.video[0]
        packets = [packet for packet in source.demux(stream) if packet.size]
        copied = file.add_stream_from_template(stream)
        order = sorted(packet.pts for packet in packets)
        number = {pts: place for place, pts in enumerate(order)}
        first, packets_kept = film.cut or (0, film.frames)
        begin = max(i for i, packet in enumerate(packets) if packet.is_keyframe and number[packet.pts] <= first)
        edited = film.container in ("mp4", "mov")
        start = order[first] if edited else packets[begin].pts
        kept = packets[begin : begin + packets_kept]
        shown = sorted(number[packet.pts] for packet in kept if packet.pts >= start)
        work = BitStreamFilterContext(film.filters or "null", stream, copied)
        for packet in kept:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copied
            file.mux(work.filter(packet))
    return shown


# Of the display matrix: the directions of a step to the right and of a step down.
_TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def _turn(path: Path, degrees: int) -> None:
    """Write the turn into the track header of an mp4 or mov, as phones do."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    a, b, c, d = _TURNS[degrees]
    rows = [a, b, 0, c, d, 0, 0, 0]
    matrix = b"".join((value * 65536).to_bytes(4, "big", signed=True) for value in rows) + (1 << 30).to_bytes(4, "big")
    content[at : at + 36] = matrix
    path.write_bytes(content)


_X264 = {"crf": "22", "preset": "veryfast", "g": "12"}
_OPEN = {**_X264, "x264-params": "open-gop=1"}
_X265 = {"preset": "ultrafast", "x265-params": "keyint=12:log-level=none"}
_X265_CLOSED = {"preset": "ultrafast", "x265-params": "keyint=12:open-gop=0:log-level=none"}
_VP = {"g": "12", "cpu-used": "8", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"}
_MPEG = {"g": "12", "b": "2000000"}
_MPEG_B = {**_MPEG, "bf": "2"}
_UPSIDE_DOWN = "h264_metadata=display_orientation=insert:rotate=180"

FILMS = (
    *(
        Film(f"h264.{container}", "libx264", options=_X264)
        for container in ("mp4", "mov", "mkv", "avi", "ts", "flv", "h264")
    ),
    *(Film(f"h264_open.{container}", "libx264", options=_OPEN) for container in ("mp4", "mkv", "ts")),
    *(
        Film(f"h264_gop{gop}.{c}", "libx264", options={**_X264, "g": str(gop)})
        for gop in (1, 2, 3, 5)
        for c in ("mp4", "mkv")
    ),
    Film("h264_no_b.mp4", "libx264", options={**_X264, "bf": "0"}),
    Film("h264_refresh.mp4", "libx264", options={**_X264, "x264-params": "intra-refresh=1"}),
    Film("h264_interlaced.mkv", "libx264", options={**_X264, "flags": "+ildct+ilme"}),
    *(Film(f"h264_sound.{c}", "libx264", options=_X264, sound=True) for c in ("mp4", "mkv", "ts", "avi", "flv")),
    Film("h264_10bit.mp4", "libx264", options=_X264, pix_fmt="yuv420p10le"),
    Film("h264_fragments.mp4", "libx264", options=_X264, muxer={"movflags": "frag_keyframe+empty_moov"}),
    Film("h264_no_index.mkv", "libx264", options=_X264, muxer={"live": "1"}),
    Film("h264_aspect.mp4", "libx264", options=_X264, aspect=Fraction(4, 3)),
    Film("h264_odd.mp4", "libx264", options=_X264, size=(65, 101), pix_fmt="yuv444p"),
    Film("hevc.mp4", "libx265", options=_X265),
    Film("hevc.ts", "libx265", options=_X265),
    Film("hevc_closed.mp4", "libx265", options=_X265_CLOSED),
    Film("hevc_10bit.mkv", "libx265", options=_X265, pix_fmt="yuv420p10le"),
    Film("vp8.webm", "libvpx", options=_VP),
    Film("vp9.webm", "libvpx-vp9", options=_VP),
    Film("vp9.mp4", "libvpx-vp9", options={**_VP, "deadline": "realtime"}),
    Film("av1.mp4", "libsvtav1", options={"g": "12", "preset": "12"}),
    Film("av1.webm", "libsvtav1", options={"g": "12", "preset": "12"}),
    Film("mpeg2.ts", "mpeg2video", options=_MPEG_B),
    Film("mpeg2_closed.ts", "mpeg2video", options={**_MPEG_B, "sc_threshold": "1000000000", "flags": "+cgop"}),
    Film("mpeg2.mpg", "mpeg2video", options=_MPEG_B),
    Film("mpeg4.avi", "mpeg4", options=_MPEG),
    Film("mpeg4_b.avi", "mpeg4", options=_MPEG_B),
    Film("mpeg4_b.mp4", "mpeg4", options=_MPEG_B),
    Film("sorenson.flv", "flv", options=_MPEG),
    Film("wmv.asf", "wmv2", options=_MPEG),
    Film("jpeg.avi", "mjpeg", options={"b": "4000000"}, pix_fmt="yuvj420p"),
    Film("prores.mov", "prores_ks", pix_fmt="yuv422p10le"),
    Film("lossless.mkv", "ffv1"),
    Film("picture.gif", "gif", pix_fmt="rgb8"),
    *(Film(f"h264_cut.{c}", "libx264", options=_X264, cut=(17, 31)) for c in ("mp4", "mov", "mkv", "ts")),
    *(Film(f"h264_open_cut.{c}", "libx264", options=_OPEN, cut=(21, 31)) for c in ("mp4", "mkv", "ts")),
    *(Film(f"hevc_cut.{c}", "libx265", options=_X265, cut=(17, 31)) for c in ("mp4", "mov", "mkv")),
    Film("mpeg2_cut.ts", "mpeg2video", options=_MPEG_B, cut=(17, 31)),
    Film("mpeg4_cut.mp4", "mpeg4", options=_MPEG_B, cut=(17, 31)),
    *(
        Film(f"h264_variable.{c}", "libx264", options=_X264, variable=True)
        for c in ("mp4", "mov", "mkv", "avi", "flv", "ts")
    ),
    Film("vp9_variable.webm", "libvpx-vp9", options=_VP, variable=True),
    Film("ntsc.mkv", "libx264", options=_X264, rate=Fraction(30000, 1001)),
    Film("ntsc.mp4", "libx264", options=_X264, rate=Fraction(30000, 1001)),
    *(Film(f"h264_turned{degrees}.mp4", "libx264", options=_X264, turn=degrees) for degrees in (90, 180, 270)),
    Film("hevc_turned90.mov", "libx265", options=_X265, turn=90),
    Film("h264_cut_turned270.mov", "libx264", options=_X264, cut=(17, 31), turn=270),
    Film(
        "h264_upside_down.mkv",
        "libx264",
        options=_X264,
        turn=180,
        filters="h264_metadata=display_orientation=insert:rotate=180",
    ),
)


def drawn(rng: Random, number: int) -> Film:
    """A film with random codec, container, groups of pictures, times and cut."""
    codec = rng.choice(["libx264"] * 4 + ["libx265", "libvpx-vp9", "mpeg4", "mpeg2video"])
    gop, b_frames = rng.choice([1, 2, 3, 4, 7, 12, 25, 250]), rng.randint(0, 5)
    containers = {
        "libx264": ("mp4", "mp4", "mov", "mkv", "mkv", "avi", "ts", "flv"),
        "libx265": ("mp4", "mov", "mkv", "ts"),
        "libvpx-vp9": ("webm", "mkv", "mp4"),
        "mpeg4": ("avi", "mp4", "mkv"),
        "mpeg2video": ("ts", "mpg", "mkv"),
    }[codec]
    known = ("open-gop=1", "scenecut=0", "b-pyramid=0", "slices=3", "repeat-headers=1", "aud=1", "intra-refresh=1")
    switches = rng.sample(known, k=rng.randint(0, 4))
    options = {
        "libx264": {
            "preset": rng.choice(["ultrafast", "veryfast", "medium"]),
            "g": str(gop),
            "bf": str(b_frames),
            **({"x264-params": ":".join(switches)} if switches else {}),
        },
        "libx265": {
            "preset": "ultrafast",
            "x265-params": f"keyint={gop}:bframes={b_frames}:open-gop={rng.randint(0, 1)}:log-level=none",
        },
        "libvpx-vp9": {**_VP, "g": str(gop), "lag-in-frames": str(rng.choice([0, 8, 25]))},
        "mpeg4": {**_MPEG, "g": str(gop), "bf": str(min(2, b_frames))},
        "mpeg2video": {**_MPEG, "g": str(gop), "bf": str(min(2, b_frames))},
    }[codec]
    frames, container = rng.randint(1, 90), rng.choice(containers)
    muxers = {
        "mp4": [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}],
        "mkv": [{}, {"live": "1"}],
    }
    muxer, variable, first = rng.choice(muxers.get(container, [{}])), False, rng.randrange(frames)
    if codec in ("libx264", "libvpx-vp9") and container in ("mp4", "mov", "mkv", "webm"):
        variable = rng.random() < 0.3
    # A copy needs a keyframe to begin at (no intra refresh) and an edit list (no fragments).
    copied = codec != "libvpx-vp9" and container in ("mp4", "mov", "mkv", "ts")
    copied = copied and "intra-refresh=1" not in switches and "frag" not in str(muxer)
    return Film(
        f"drawn{number}.{container}",
        codec,
        frames=frames,
        size=(rng.choice([64, 66, 80]), rng.choice([100, 102, 130])),
        rate=rng.choice([Fraction(25), Fraction(30000, 1001), Fraction(10), Fraction(60)]),
        options=options,
        cut=(first, rng.randint(max(1, frames // 3), frames)) if copied and rng.random() < 0.3 else None,
        variable=variable,
        muxer=muxer,
    )
