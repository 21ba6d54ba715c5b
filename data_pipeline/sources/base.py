"""The interface of every dataset layout: videos with frames, sentences and the masks of the sentences.

A source reports all faults in one DataError, with files and fields. Opening reads the annotations; frames are read on
request.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.picture import SUFFIXES, image_size, pictures_in, read_image
from flowmask.models.errors import DataError

Frame = NDArray[np.uint8]  # rgb8 [H W 3]


@dataclass(frozen=True)
class Expression:
    """One sentence of a video; its mask is the union of the annotations `anno_ids`.

    Empty `anno_ids`: the video has no masks, or the sentence names nothing, so its mask is empty.
    kind: kind of the sentence if a benchmark reports kinds separately, such as "referring"; otherwise ""
    """

    exp_id: str
    text: str
    anno_ids: tuple[str, ...]
    kind: str = ""


class Video(ABC):
    """One video of a dataset; `frame_names` are in time order, as evaluation writes them.

    `video_id` is unique in its dataset, and together with `source` (the dataset's name, if any) in a cache.
    """

    source: str = ""
    video_id: str
    frame_names: tuple[str, ...]
    expressions: tuple[Expression, ...]
    has_masks: bool

    @property
    def label(self) -> str:
        """A name that is unique in a cache."""
        return f"{self.source}/{self.video_id}" if self.source else self.video_id

    def __str__(self) -> str:
        return f"video {self.label}"

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(height, width) in px of every frame."""

    @abstractmethod
    def frames(self, ids: Sequence[int]) -> list[Frame]:
        """rgb8 [H W 3] of each frame id, in the requested order; DataError names the faulty file."""

    @abstractmethod
    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        """Union of annotations, bool [n H W] at the size of the frames; DataError for a mask of another size."""

    @abstractmethod
    def files_digest(self) -> str:
        """Hash of the names and sizes of the video's frame files; a missing file has no size."""

    def missing_file(self, ids: Sequence[int]) -> Path | None:
        """The first missing file of these frames or of the video's masks; checked without reading."""
        return None

    def annotated(self, anno_ids: Sequence[str]) -> Collection[int] | None:
        """Frame ids with known masks (also empty ones) of these annotations; None: all frames.

        Other frames count in no loss and no score. Without annotation ids: the frames with any known mask.
        """
        return None

    def check_masks(self) -> None:
        """DataError if a sentence names an annotation that has no mask in the video; reads some of the masks.

        Called before a cache build or an evaluation starts. An unreadable mask is reported when it is needed.
        """
        return


def names_nothing(video: Video, expression: Expression) -> bool:
    """Whether a sentence's true mask is known to be empty, because it names nothing in the video."""
    return video.has_masks and not expression.anno_ids


V = TypeVar("V", bound=Video, covariant=True)


class FolderVideo(Video):
    """A video whose frames are pictures of one folder, named by `frame_names`: JPEG, or another format."""

    def __init__(
        self,
        video_id: str,
        *,
        folder: Path,
        frame_names: Sequence[str],
        expressions: Sequence[Expression],
        has_masks: bool,
    ):
        self.video_id, self.folder, self.has_masks = video_id, folder, has_masks
        self.frame_names, self.expressions = tuple(frame_names), tuple(expressions)

    def frame_path(self, index: int) -> Path:
        """The frame's file; a missing one gets .jpg. Raises DataError if two files match."""
        name = self.frame_names[index]
        usual = self.folder / f"{name}.jpg"
        if os.path.exists(usual):  # noqa: PTH110 - false for a too long path, where Path raises
            return usual
        found = self._other_files.get(name, [usual])
        if len(found) > 1:
            raise DataError(f"{found[0]}: the frame {name} is in {found[1].name} too; remove one")
        return found[0]

    @cached_property
    def _other_files(self) -> dict[str, list[Path]]:
        """Pictures of the folder with a suffix other than .jpg, by frame name."""
        files: dict[str, list[Path]] = {}
        with suppress(OSError):  # if the folder is missing, all frames are
            for path in pictures_in(self.folder, suffixes=SUFFIXES):
                if path.suffix != SUFFIXES[0]:
                    files.setdefault(path.stem, []).append(path)
        return files

    @cached_property
    def size(self) -> tuple[int, int]:
        return image_size(self.frame_path(0))

    def frames(self, ids: Sequence[int]) -> list[Frame]:
        read = {i: read_image(self.frame_path(i), size=self.size) for i in sorted(set(ids))}
        return [read[i] for i in ids]

    def files_digest(self) -> str:
        return names_and_sizes(map(self.frame_path, range(len(self.frame_names))))

    def missing_file(self, ids: Sequence[int]) -> Path | None:
        return next((path for path in map(self.frame_path, ids) if not os.path.exists(path)), None)  # noqa: PTH110


def is_evaluation(split: str) -> bool:
    """Whether a split is for scoring, by its name: valid, valid_u, val, test, testA, ..."""
    return split.rpartition("/")[2].startswith(("val", "test"))


class LazyVideos(Sequence[V]):
    """Videos read on request, so that memory does not grow with their number."""

    @abstractmethod
    def at(self, place: int) -> V:
        """The video at a non-negative index."""

    @overload
    def __getitem__(self, index: int) -> V: ...

    @overload
    def __getitem__(self, index: slice) -> list[V]: ...

    def __getitem__(self, index: int | slice) -> V | list[V]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]


class VideoSet(ABC):
    """The videos of a cache or an evaluation: a split of a dataset, or of several datasets."""

    @abstractmethod
    def videos(self) -> Sequence[Video]:
        """The videos in a fixed order: that of the annotation file."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Hashes of the annotation files: `expressions`, and `masks` if there are any."""


class Source(VideoSet):
    """One split of a dataset: the methods that each layout's file must define.

    family: datasets of one family use equal ids for equal videos, so one may leak into the other; by default each
    layout is a separate family
    """

    family: ClassVar[str | None] = None

    @abstractmethod
    def __init__(self, root: Path, *, split: str):
        """Read the annotations of a split of the dataset in `root` (data.root, data.split)."""

    @classmethod
    @abstractmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """The splits in `root` for scoring, for any `split`."""

    @classmethod
    @abstractmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        """Video ids of a split, only from its list; None if it has none."""

    @classmethod
    def is_scored(cls, root: Path, split: str) -> bool:
        """Whether a split is for scoring."""
        return is_evaluation(split)


def names_and_sizes(paths: Iterable[Path]) -> str:
    """Hash of the names and sizes of files; a missing file counts as missing and is quarantined later."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            size: int | None = path.stat().st_size
        except OSError:
            size = None
        digest.update(f"{path.name} {size}\n".encode())
    return digest.hexdigest()


def refuse_empty(videos: Sequence[Video], *, where: object) -> None:
    """Raises DataError if there is no sentence: nothing could be cached, trained or scored."""
    if not any(video.expressions for video in videos):
        raise DataError(f"{where}: the dataset is empty: {len(videos)} videos and no expression")
