"""Writing an H.264 mp4, atomically: even sides and 4:2:0 colour, which every player supports.

The same frames give the same bytes.
"""

from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from flowmask.data_pipeline.video.sound import SoundCopy, Soundtrack
from flowmask.data_pipeline.video.times import exact_rate
from flowmask.models.errors import DataError


class VideoWriter:
    """Frames of one size to an mp4; `with` writes it completely or not at all."""

    def __init__(self, path: Path, *, height: int, width: int, fps: float, sound: Soundtrack | None = None) -> None:
        """height, width: of the frames; fps: frames per second, also fractions such as 29.97.

        sound: sound of the video, from its start, for the duration of the frames
        """
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._even = (height % 2, width % 2)
        try:
            self._partial.touch()  # av opens its file only at the first packet
        except OSError as error:
            raise DataError(f"cannot write the video {path}: {error.strerror}") from error
        options = {"movflags": "+faststart"}  # the index is at the front, so that it plays during a download
        self._container = av.open(str(self._partial), "w", format="mp4", options=options)
        self._rate, self._frames = exact_rate(fps), 0
        self._reformatter = VideoReformatter()  # a frame's own one would make its tables for each frame
        stream = self._container.add_stream(_encoder(), rate=self._rate)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        stream.width, stream.height = width + self._even[1], height + self._even[0]
        stream.pix_fmt = "yuv420p"
        # Without the last option, libx264's bytes depend on the processor and on the addresses of its buffers.
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "cpu-independent=1"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, in the data and in the header
        context.color_range = ColorRange.MPEG
        context.thread_count = 1
        self._sound = None if sound is None else SoundCopy(sound, self._container)

    @property
    def sound_problem(self) -> str:
        """Why a part of the sound is missing; "" if none is."""
        return "" if self._sound is None else self._sound.problem

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append one frame: uint8 [H W 3]; an odd side grows by its last row or column."""
        if any(self._even):
            picture = np.pad(picture, ((0, self._even[0]), (0, self._even[1]), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        colours = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
        self._send(self._reformatter.reformat(frame, format="yuv420p", threads=1, **colours))

    def _send(self, frame: av.VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
        self._frames += frame is not None
        if self._sound is not None:
            self._sound.write_until(self._frames / self._rate)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._send(None)
            self._container.close()
            if self._sound is not None:
                self._sound.close()
            if kind is None:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)


def _encoder() -> str:
    """H.264 by libx264, which PyAV's wheels include."""
    if "libx264" not in av.codecs_available:
        raise DataError("this PyAV has no libx264; install the wheel: pip install --force-reinstall av")
    return "libx264"
