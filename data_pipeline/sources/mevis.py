"""MeViS: {split}/JPEGImages/<video>/<frame>.jpg, meta_expressions.json and mask_dict.json (if public).

A sentence names nothing where its `anno_id` is [] or null, or none of its annotations shows a pixel in any frame.
An annotation's masks are in the order in which its video's frames are listed; time order is that of their names,
numbers as numbers. Refuses missing files and fields, masks that do not fit their video, sentences without words
and a split without any.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.formats.fields import check_names, field
from flowmask.data_pipeline.formats.json_members import Places, members, read_range
from flowmask.data_pipeline.formats.names import in_time_order
from flowmask.data_pipeline.formats.reading import Mistakes
from flowmask.data_pipeline.sources.base import FolderVideo, LazyVideos, Source, is_evaluation, refuse_empty
from flowmask.data_pipeline.sources.meta_expressions import listed_videos, read_entry
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_META, _MASKS, _FRAMES = "meta_expressions.json", "mask_dict.json", "JPEGImages"
_NOTHING, _NO_LIST = -4, -2
_VIDEOS_KEPT = 16  # those whose clips are decoded at the same time


class MevisVideo(FolderVideo):
    """One folder of frames; `masks` is the split's annotation table, None where masks are not public."""

    def __init__(self, video_id: str, *, listed: Sequence[str], masks: Places | None, masks_path: Path, **rest: Any):
        """listed: names of the frames, in the order of the masks."""
        super().__init__(video_id, has_masks=masks is not None, frame_names=in_time_order(listed), **rest)
        self._masks, self._masks_path = masks, masks_path
        places = {name: place for place, name in enumerate(listed)}
        self._places = [places[name] for name in self.frame_names]  # of a frame's mask

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        assert self._masks is not None, f"{self.video_id} has no masks"
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            masks = self._masks.read(anno_id)
            for place, i in enumerate(ids):
                where = f"{self._masks_path}: annotation {anno_id}, frame {self.frame_names[i]}"
                union[place] |= rle.decode(masks[self._places[i]], size=self.size, where=where)
        return union


class MevisSource(Source):
    """One split folder in the MeViS layout."""

    family = "mevis"

    def __init__(self, root: Path, *, split: str):
        self.folder = root / split
        if not self.folder.is_dir():
            found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else None
            hint = f"; {root} holds {', '.join(found) or 'no folder'}" if found is not None else ""
            raise DataError(f"{self.folder}: no such dataset folder (data.root / data.split){hint}")
        self._meta_path, self._masks_path = self.folder / _META, self.folder / _MASKS
        if not (self.folder / _FRAMES).is_dir():
            raise DataError(f"{self.folder / _FRAMES} is missing; a MeViS split holds {_FRAMES}, {_META}, {_MASKS}")
        self._masks: Places | None = None
        if self._masks_path.exists():
            counted = ((member, _count(member.value)) for member in members(self._masks_path))
            self._masks = Places(self._masks_path, counted)
        self._videos = _Videos(self, self._meta_path)
        refuse_empty(self._videos, where=self._meta_path)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        return sorted(path.name for path in root.iterdir() if path.is_dir() and is_evaluation(path.name))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        return listed_videos(root / split / _META, root / split / _FRAMES)

    def videos(self) -> Sequence[MevisVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        identity = {"expressions": sha256_of(self._meta_path)}
        if self._masks is not None:
            identity["masks"] = sha256_of(self._masks_path)
        return identity

    def video(self, video_id: str, entry: Any) -> MevisVideo:
        """The video that an entry of the file describes; DataError names the field that is wrong."""
        names, expressions = read_entry(self._meta_path, video_id, entry, means=self._annotations)
        return MevisVideo(
            video_id,
            folder=self.folder / _FRAMES / video_id,
            listed=names,
            expressions=expressions,
            masks=self._masks,
            masks_path=self._masks_path,
        )

    def _annotations(self, entry: Any, *, frames: int, where: str, **_: Any) -> tuple[str, ...]:
        if self._masks is None or (isinstance(entry, dict) and entry.get("anno_id", "") is None):
            return ()
        anno_ids = tuple(check_names(field(entry, "anno_id", list, where=where), where=f"{where}.anno_id"))
        shown = False
        for anno_id in anno_ids:
            number = self._masks.number(anno_id)
            if number is None or number == _NOTHING:
                raise DataError(f"{where}.anno_id names {anno_id}, which {self._masks_path} does not hold")
            if number // 2 != frames:
                has = "no list of" if number == _NO_LIST else number // 2
                raise DataError(f"{self._masks_path}: annotation {anno_id} has {has} masks, its video {frames} frames")
            shown = shown or bool(number % 2)
        return anno_ids if shown else ()


class _Videos(LazyVideos[MevisVideo]):
    """The videos of the file, checked once from end to end, each read again when it is asked for.

    Memory holds a few of them: a split of 20,000 videos is no larger than one of 1,000.
    """

    def __init__(self, source: MevisSource, path: Path):
        self._source, self._path = source, path
        self._places = array("q")
        mistakes = Mistakes()
        for member in members(path, field="videos"):
            with mistakes:
                source.video(member.name, member.value)
            self._places.extend((member.start, member.length, member.name_start, member.name_length))
        mistakes.refuse()
        self._kept = lru_cache(maxsize=_VIDEOS_KEPT)(self._read)

    def __len__(self) -> int:
        return len(self._places) // 4

    def at(self, place: int) -> MevisVideo:
        return self._kept(place)

    def _read(self, index: int) -> MevisVideo:
        start, length, name_start, name_length = self._places[4 * index : 4 * index + 4]
        entry = read_range(self._path, start, length)
        return self._source.video(read_range(self._path, name_start, name_length), entry)


def _count(masks: Any) -> int:
    """Twice the number of an annotation's masks, and 1 if one isn't empty; or what stands there instead of a list."""
    if masks is None:
        return _NOTHING
    return 2 * len(masks) + (not all(map(rle.is_empty, masks))) if isinstance(masks, list) else _NO_LIST
