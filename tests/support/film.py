"""Real video files for tests, written by FFmpeg's libraries in PyAV; no installed program is needed."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = (48, 64)  # height, width in px


def write_film(path: Path, *, frames: int) -> None:
    """An H.264 file of that many different frames. Its index is in front, so that a cut file still opens."""
    height, width = SIZE
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            picture = np.stack([4 * across, 5 * down, np.full(SIZE, 20 * number)], axis=-1) % 256
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
