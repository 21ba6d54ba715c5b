"""Video files whose sound can be compared with their pictures: a bright picture and a tone begin together."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

CLAPS = (1.0, 2.4)  # s on the file's clock, when a tone and bright pictures begin
CLAP_S, TONE_HZ = 0.2, 1000
SIZE = (48, 64)  # height, width in px
VIDEO_CODECS = {"webm": "libvpx", "avi": "mpeg4", "flv": "flv", "asf": "wmv2"}


def write_claps(
    path: Path,
    codec: str,
    *,
    fps: int = 10,
    length_s: float = 4.0,
    video_from_s: float = 0.0,
    sound_from_s: float = 0.0,
) -> None:
    """A video of `fps` frames a second with sound in `codec`; `video_from_s`, `sound_from_s`: on the file's clock."""
    with av.open(str(path), "w") as file:
        pictures = file.add_stream(VIDEO_CODECS.get(path.suffix[1:], "libx264"), rate=fps)
        assert isinstance(pictures, av.VideoStream)
        pictures.height, pictures.width, pictures.pix_fmt = *SIZE, "yuv420p"
        pictures.codec_context.thread_count = 1
        rate = 48000 if codec in ("libopus", "opus") else 44100
        sound = file.add_stream(codec, rate=rate, layout="stereo" if codec in ("vorbis", "wmav2") else "mono")
        sound.codec_context.options = {"strict": "experimental"} if codec == "vorbis" else {"b": "128000"}
        for number in range(round((length_s - video_from_s) * fps)):
            at = video_from_s + number / fps
            light = 235 if any(clap - 1e-6 <= at < clap + CLAP_S - 1e-6 for clap in CLAPS) else 16
            frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), light, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = round(at * fps), Fraction(1, fps)
            file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
        seconds = np.arange(round(length_s * rate)) / rate
        seconds = seconds[round(sound_from_s * rate) :]
        heard = np.logical_or.reduce([(seconds >= clap) & (seconds < clap + CLAP_S) for clap in CLAPS])
        samples = (0.5 * heard * np.sin(2 * np.pi * TONE_HZ * seconds)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(sound_from_s * rate)
        file.mux(sound.encode(frame))
        file.mux(sound.encode(None))


def seen(path: Path) -> list[float]:
    """When bright pictures begin, in s from the first picture on."""
    with av.open(str(path)) as file:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")[: SIZE[0]].mean()) for frame in file.decode(video=0)]
    times, bright = [time - frames[0][0] for time, _ in frames], [light > 120 for _, light in frames]
    return [time for time, now, before in zip(times, bright, [False, *bright]) if now and not before]


def heard(path: Path) -> list[float]:
    """When tones begin, in s from the first picture on."""
    with av.open(str(path)) as file:
        first = next(file.decode(video=0)).time
    with av.open(str(path)) as file:
        pieces = list(file.decode(audio=0))
    rate = pieces[0].sample_rate
    samples = np.concatenate([_mono(piece) for piece in pieces])
    start = pieces[0].time - first
    loud = np.convolve(np.abs(samples), np.ones(rate // 200) / (rate // 200), "same") > 0.05
    begins = np.flatnonzero(loud & ~np.concatenate([[False], loud[:-1]]))
    return [start + float(place) / rate for place in begins]


def _mono(piece: av.AudioFrame) -> np.ndarray:
    """float samples [n]; the first channel of a frame."""
    values = piece.to_ndarray()
    values = values[0] if piece.format.is_planar else values.reshape(-1, len(piece.layout.channels))[:, 0]
    scale = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    return values.astype(np.float64) / scale


def packets(path: Path) -> list[bytes]:
    """The stored packets of the sound."""
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


def span_s(path: Path, kind: str) -> float:
    """When the last packet of pictures ("video") or sound ("audio") ends, in s from the first picture on."""
    with av.open(str(path)) as file:
        first = next(file.decode(video=0)).time
    with av.open(str(path)) as file:
        found = [packet for packet in file.demux() if packet.size and packet.stream.type == kind]
        return max(float((packet.pts + packet.duration) * packet.time_base) for packet in found) - first
