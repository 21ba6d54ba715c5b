"""The input of a prediction: a video file or a folder of frames; frames are read by number.

If a lower rate is requested for a video file, frame k is the picture shown at k/fps s.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.picture import SUFFIXES, image_size, pictures_in, read_image
from flowmask.data_pipeline.video.sound import Soundtrack, soundtrack_of
from flowmask.data_pipeline.video.times import exact_rate
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import ConfigError, DataError
from flowmask.models.text import is_unicode

FOLDER_FPS = 10.0
_SLOWEST, _FASTEST = 0.01, 1000.0  # frames per second
_SEEN_S = 0.1  # a larger offset between sound and pictures is reported


class InputVideo:
    """A video file, or a folder of images in natural order (2.png before 10.png), turned as their EXIF says.

    notes: warnings for the user; source_frames: index in the file of each frame; None: its own number
    """

    def __init__(self, path: Path, *, fps: float | None = None, allow_truncated: bool = False) -> None:
        """fps: for a file: sample frames at this rate; None, or a rate not below the file's: all frames.

        For a folder, all frames are used and fps is the rate of the overlay; None: 10. Raises UserError.
        """
        if not is_unicode(str(path)):
            raise DataError(f"the path {str(path)!r} is not UTF-8; rename it")
        if fps is not None and not _SLOWEST <= fps <= _FASTEST:
            raise ConfigError(f"fps is {fps:g}; it must be from {_SLOWEST:g} to {_FASTEST:g} frames per second")
        self.path, self.notes = path, list[str]()
        self.source_frames: list[int] | None = None
        self._last: tuple[int, NDArray[np.uint8]] | None = None
        self._file = None if path.is_dir() else VideoFile(path, allow_truncated=allow_truncated)
        if self._file is None:
            self._images = _images_in(path)
            self.frame_names, self.fps = [image.stem for image in self._images], fps or FOLDER_FPS
            return
        self.fps = self._sampled(self._file, fps)
        count = len(self._file if self.source_frames is None else self.source_frames)
        self.frame_names = [f"{i:05d}" for i in range(count)]

    def _sampled(self, file: VideoFile, fps: float | None) -> float:
        """Choose the frames, and the rate at which they are shown."""
        rate = file.frames_per_second
        if fps is not None and exact_rate(fps) < exact_rate(rate):
            self.source_frames = file.times.shown_at(exact_rate(fps))
            return fps
        if fps is not None and exact_rate(fps) > exact_rate(rate):
            self.notes.append(
                f"it has {rate:.6g} frames per second: all are used, and none is repeated for --fps {fps:g}"
            )
        if self.sound is not None and (drift := file.times.drift_s(rate)) > _SEEN_S:
            self.notes.append(
                f"its frame rate varies: overlays show its frames evenly, up to {drift:.1f} s off the sound; --fps "
                f"below {rate:.6g} keeps them together"
            )
        return rate

    @cached_property
    def sound(self) -> Soundtrack | None:
        """The sound of the frames."""
        return None if self._file is None else soundtrack_of(self.path, self._file.times)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self._file.size if self._file is not None else image_size(self._images[0], upright=True)

    def label(self, number: int) -> str:
        """The display time of a frame, or its name in a folder."""
        if self._file is None:
            return self.frame_names[number]
        return f"{number / self.fps if self.source_frames else self._file.times.begin_s(number):.1f} s"

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id."""
        if self._file is None:
            return [read_image(self._images[i], size=self.size, upright=True) for i in ids]
        if self.source_frames is None or not ids:
            return self._file.frames(ids)
        wanted = [self.source_frames[i] for i in ids]
        kept = self._last  # a picture for many frames: decoding it again would start at the first frame
        known = [i for i in wanted if kept is None or i != kept[0]]
        by_number = dict(zip(known, self._file.frames(known))) | ({} if kept is None else {kept[0]: kept[1]})
        self._last = (wanted[-1], by_number[wanted[-1]])
        return [by_number[i] for i in wanted]


def _images_in(folder: Path) -> list[Path]:
    """The frames of a folder, in order; DataError if there are none, or their names can't be those of masks."""
    try:
        images = pictures_in(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    if not images:
        raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)}); give a video or frames")
    names = [image.stem for image in images]
    if wrong := [name for name in names if not is_unicode(name)]:
        raise DataError(f"{folder}: the name {wrong[0]!r} is not UTF-8; rename it")
    if twice := [name for name, other in pairwise(names) if name == other]:
        raise DataError(f"{folder} holds two images called {twice[0]}; remove one")
    return images
