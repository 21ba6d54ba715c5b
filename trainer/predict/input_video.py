"""What a prediction is made of: a video file or a folder of frames, whose frames are read by number."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.picture import SUFFIXES, image_size, pictures_in, read_image
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.models.errors import DataError
from flowmask.models.text import is_unicode

FOLDER_FPS = 10.0


class InputVideo:
    """A video file, or a folder of images in natural order (2.png before 10.png), turned as their EXIF says."""

    def __init__(self, path: Path, *, fps: float | None = None, allow_truncated: bool = False) -> None:
        """fps: frames per second of the overlay; None: the file's own, 10 for a folder. Raises DataError."""
        if not is_unicode(str(path)):
            raise DataError(f"the path {str(path)!r} is not UTF-8; rename it")
        self._path = path
        self._file = None if path.is_dir() else VideoFile(path, allow_truncated=allow_truncated)
        if self._file is not None:
            self.frame_names = [f"{i:05d}" for i in range(len(self._file))]
            self.fps = fps or self._file.frames_per_second
            return
        try:
            self._images = pictures_in(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if not self._images:
            raise DataError(f"{path} holds no image ({', '.join(SUFFIXES)}); give a video or frames")
        self.frame_names = [image.stem for image in self._images]
        if wrong := [name for name in self.frame_names if not is_unicode(name)]:
            raise DataError(f"{path}: the name {wrong[0]!r} is not UTF-8; rename it")
        twice = [name for name, other in zip(self.frame_names, self.frame_names[1:]) if name == other]
        if twice:
            raise DataError(f"{path} holds two images called {twice[0]}; remove one")
        self.fps = fps or FOLDER_FPS

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return self._file.size if self._file is not None else image_size(self._images[0], upright=True)

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        """rgb8 [H W 3] of each id."""
        if self._file is not None:
            return self._file.frames(ids)
        return [read_image(self._images[i], size=self.size, upright=True) for i in ids]
