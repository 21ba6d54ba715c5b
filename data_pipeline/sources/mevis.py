"""MeViS: {split}/JPEGImages/<video>/<frame>.jpg, meta_expressions.json and mask_dict.json (if public).

A sentence names nothing if its `anno_id` is [] or null, or if none of its annotations shows a pixel in any frame.
An annotation's masks are in the listed order of its video's frames; time order is that of the frame names,
sorted by number. Refuses missing files and fields, masks that do not fit their video, sentences without words,
and a split without sentences.
"""

from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.formats.fields import check_names, field
from flowmask.data_pipeline.formats.json_members import Places, members, read_range
from flowmask.data_pipeline.formats.meta_expressions import listed_videos, read_entry
from flowmask.data_pipeline.formats.names import in_time_order
from flowmask.data_pipeline.formats.reading import Mistakes
from flowmask.data_pipeline.sources.base import Expression, FolderVideo, LazyVideos, Source, is_evaluation, refuse_empty
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_META, _MASKS, _FRAMES = "meta_expressions.json", "mask_dict.json", "JPEGImages"
_NOTHING, _NO_LIST = -4, -2
_VIDEOS_KEPT = 16  # videos decoded at the same time

F = TypeVar("F", bound=FolderVideo)


class MevisVideo(FolderVideo):
    """One folder of frames; `masks` is the split's annotation table, None if masks are not public."""

    def __init__(self, video_id: str, *, listed: Sequence[str], masks: Places | None, masks_path: Path, **rest: Any):
        """listed: names of the frames, in the order of the masks."""
        super().__init__(video_id, has_masks=masks is not None, frame_names=in_time_order(listed), **rest)
        self._masks, self._masks_path = masks, masks_path
        places = {name: place for place, name in enumerate(listed)}
        self._places = [places[name] for name in self.frame_names]  # index of each frame's mask

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        assert self._masks is not None, f"{self.video_id} has no masks"
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            masks = self._masks.read(anno_id)
            for place, i in enumerate(ids):
                where = f"{self._masks_path}: annotation {anno_id}, frame {self.frame_names[i]}"
                union[place] |= rle.decode(masks[self._places[i]], size=self.size, where=where)
        return union


class SplitFolder(Source, Generic[F]):
    """A split in a folder with JPEGImages and meta_expressions.json; the layout says where the masks are."""

    holds: ClassVar[str]

    def __init__(self, root: Path, *, split: str):
        folder = root / split
        if not folder.is_dir():
            found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else None
            hint = f"; {root} holds {', '.join(found) or 'no folder'}" if found is not None else ""
            raise DataError(f"{folder}: no such dataset folder (data.root / data.split){hint}")
        if not (folder / _FRAMES).is_dir():
            raise DataError(f"{folder / _FRAMES} is missing; {self.holds}")
        self.open(folder, split=split, meta=folder / _META)

    def open(self, folder: Path, *, split: str, meta: Path) -> None:
        """Read the list of videos `meta`, whose frames and masks are in `folder`."""
        self.folder, self.frames, self.meta_path, self.split = folder, folder / _FRAMES, meta, split
        self.open_masks()
        self._videos = _Videos(meta, self.video)
        refuse_empty(self._videos, where=meta)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        return sorted(path.name for path in root.iterdir() if path.is_dir() and is_evaluation(path.name))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        return listed_videos(root / split / _META, root / split / _FRAMES)

    def videos(self) -> Sequence[F]:
        return self._videos

    @abstractmethod
    def open_masks(self) -> None:
        """Find the masks of `folder`, before any video is read."""

    @abstractmethod
    def video(self, video_id: str, entry: Any) -> F:
        """The video of a list entry; DataError names the wrong field."""


class MevisSource(SplitFolder[MevisVideo]):
    """One split folder in the MeViS layout."""

    family = "mevis"
    holds = f"a MeViS split holds {_FRAMES}, {_META}, {_MASKS}"

    def open_masks(self) -> None:
        self.masks_path = self.folder / _MASKS
        self._masks: Places | None = None
        if self.masks_path.exists():
            counted = ((member, _count(member.value)) for member in members(self.masks_path))
            self._masks = Places(self.masks_path, counted)

    def identity(self) -> dict[str, str]:
        identity = {"expressions": sha256_of(self.meta_path)}
        if self._masks is not None:
            identity["masks"] = sha256_of(self.masks_path)
        return identity

    def video(self, video_id: str, entry: Any) -> MevisVideo:
        names, expressions = read_entry(self.meta_path, video_id, entry, expression=self.expression)
        return MevisVideo(
            video_id,
            folder=self.frames / video_id,
            listed=names,
            expressions=expressions,
            masks=self._masks,
            masks_path=self.masks_path,
        )

    def expression(self, entry: Any, *, exp_id: str, text: str, frames: int, where: str, **_: Any) -> Expression:
        """The sentence of an entry, in a video of `frames` frames."""
        return Expression(exp_id, text, self._annotations(entry, frames=frames, where=where))

    def _annotations(self, entry: Any, *, frames: int, where: str) -> tuple[str, ...]:
        if self._masks is None or (isinstance(entry, dict) and entry.get("anno_id", "") is None):
            return ()
        anno_ids = tuple(check_names(field(entry, "anno_id", list, where=where), where=f"{where}.anno_id"))
        shown = False
        for anno_id in anno_ids:
            number = self._masks.number(anno_id)
            if number is None or number == _NOTHING:
                raise DataError(f"{where}.anno_id names {anno_id}, which {self.masks_path} does not hold")
            if number // 2 != frames:
                has = "no list of" if number == _NO_LIST else number // 2
                raise DataError(f"{self.masks_path}: annotation {anno_id} has {has} masks, its video {frames} frames")
            shown = shown or bool(number % 2)
        return anno_ids if shown else ()


class _Videos(LazyVideos[F]):
    """The videos of a list; all are checked once, and each is read again on request.

    Memory holds only a few videos, for any size of the split.
    """

    def __init__(self, path: Path, read: Callable[[str, Any], F]):
        self._path, self._read = path, read
        self._places = array("q")
        mistakes = Mistakes()
        for member in members(path, field="videos"):
            with mistakes:
                read(member.name, member.value)
            self._places.extend((member.start, member.length, member.name_start, member.name_length))
        mistakes.refuse()
        self._kept = lru_cache(maxsize=_VIDEOS_KEPT)(self._read_again)

    def __len__(self) -> int:
        return len(self._places) // 4

    def at(self, place: int) -> F:
        return self._kept(place)

    def _read_again(self, index: int) -> F:
        start, length, name_start, name_length = self._places[4 * index : 4 * index + 4]
        entry = read_range(self._path, start, length)
        return self._read(read_range(self._path, name_start, name_length), entry)


def _count(masks: Any) -> int:
    """Twice the number of an annotation's masks, plus 1 if one isn't empty; the value itself if it is not a list."""
    if masks is None:
        return _NOTHING
    return 2 * len(masks) + (not all(map(rle.is_empty, masks))) if isinstance(masks, list) else _NO_LIST
