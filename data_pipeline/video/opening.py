"""Opens a video file with PyAV's FFmpeg: the accepted files, and FFmpeg's errors in one line.

Raises DataError before decoding for a file that is not regular, a format that can name other files (playlists, sets of
pictures), a file without a video stream, and pictures of more than MAX_PIXELS.
"""

import threading
from pathlib import Path

import av
import av.logging
from av.container import InputContainer

from flowmask.data_pipeline.video.promise import false_count
from flowmask.models.errors import DataError

MAX_PIXELS = 89_478_485  # Pillow's own limit
# Containers that hold their video themselves. Others (hls, dash, concat, sdp, image2, ...) open other files.
_FORMATS = (
    *("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "live_flv", "gif", "apng", "asf", "ogg", "nut", "ivf"),
    *("h264", "hevc", "vvc", "m4v", "mpegvideo", "h263", "h261", "obu", "av1", "mjpeg", "vc1", "cavsvideo", "dirac"),
    *("yuv4mpegpipe", "mxf", "wtv", "dv", "rm", "nsv", "swf", "smk", "bink", "film_cpk", "ty", "dhav", "mjpeg_2000"),
)
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(_FORMATS), "max_pixels": str(MAX_PIXELS)}
_logging = threading.Lock()


def opened(path: Path) -> InputContainer:
    """The container, which the caller closes; `video_stream` gives its stream."""
    refuse_special(path)
    if count := false_count(path):
        raise DataError(f"{path}: damaged: its header names {count:,} frames, more than it has bytes")
    try:
        return _open(path)
    except (av.FFmpegError, ValueError) as error:  # ValueError: a name that FFmpeg can't use
        raise DataError(f"{path}: no readable video, or a truncated one ({_said(path) or reason(error)})") from None


def refuse_special(path: Path) -> None:
    """Raises DataError for a path that is missing, empty or not a file: a pipe or a device could block."""
    try:
        if not path.exists():
            raise DataError(f"{path}: no such video file")
        if not path.is_file():
            raise DataError(
                f"{path}: not a video file, but a {'folder' if path.is_dir() else 'pipe, socket or device'}"
            )
        if not path.stat().st_size:
            raise DataError(f"{path}: no readable video, or a truncated one (the file is empty)")
    except OSError as error:
        raise DataError(f"{path}: the video file cannot be read ({error.strerror})") from None


def video_stream(container: InputContainer, *, path: Path) -> av.VideoStream:
    """The stream that a player shows, without cover pictures; DataError if there is none or it can't be decoded."""
    moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        kinds = " and ".join(sorted({stream.type for stream in container.streams}))
        raise DataError(f"{path}: holds no video, only {kinds or 'nothing'}")
    best = container.streams.best("video")
    stream = next((s for s in moving if s is best), moving[0])
    context = stream.codec_context
    if context is None:
        raise DataError(f"{path}: FFmpeg has no decoder for its video")
    if context.width * context.height > MAX_PIXELS:
        raise DataError(
            f"{path}: pictures of {context.width}x{context.height} px; at most {MAX_PIXELS:,} px are accepted"
        )
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_count = 1  # several clips are decoded in parallel
    return stream


def reason(error: Exception) -> str:
    """FFmpeg's text for an error."""
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())[:160]


def _open(path: Path) -> InputContainer:
    # With this prefix FFmpeg takes `http:x.mp4` as a file name.
    return av.open(f"file:{path}", options=_OPTIONS)


def _said(path: Path) -> str:
    """FFmpeg's log about a file that it can't open; it has more detail than the error code."""
    with _logging:
        before = av.logging.get_level(), av.logging.get_skip_repeated()
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)
        try:
            with av.logging.Capture() as lines:
                _open(path).close()
        except (av.FFmpegError, ValueError):
            pass
        finally:
            av.logging.set_level(before[0])
            av.logging.set_skip_repeated(before[1])
    for _, name, message in lines:
        if "not on whitelist" in message:
            return f"its format is {name}, which is not a video format or opens other files"
    return reason(ValueError(lines[-1][2])) if lines else ""
