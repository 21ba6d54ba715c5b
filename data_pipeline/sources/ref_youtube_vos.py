"""Ref-YouTube-VOS: meta_expressions/{split}/meta_expressions.json, {split}/JPEGImages, {split}/Annotations.

Annotations/<video>/<frame>.png holds the object of each pixel as its palette index; an expression names one
in `obj_id`, or nothing: [] or null. `valid` has no public masks; videos listed in meta_expressions/test do not belong
to it. Refuses missing files and fields, an object that {split}/meta.json (if present) does not list or that no
mask contains, masks without a palette or of another size, and `train` without Annotations.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.fields import field
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.meta_expressions import listed_videos, read_entry
from flowmask.data_pipeline.formats.names import in_time_order
from flowmask.data_pipeline.formats.picture import read_index_map
from flowmask.data_pipeline.formats.reading import Mistakes, shown
from flowmask.data_pipeline.sources.base import (
    Expression,
    FolderVideo,
    Source,
    is_evaluation,
    names_and_sizes,
    refuse_empty,
)
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_EXPRESSIONS, _META = "meta_expressions", "meta_expressions.json"
_LARGEST_INDEX, _DIGITS = 255, 3
_MAPS_KEPT = 32  # the masks of a clip's objects are read one after another, from the same files


class PaletteVideo(FolderVideo):
    """Frames, each with an index map; `annotations` is None if masks are not public."""

    def __init__(self, video_id: str, *, annotations: Path | None, **rest: Any):
        super().__init__(video_id, has_masks=annotations is not None, **rest)
        self._annotations = annotations

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        objects = [int(anno_id) for anno_id in anno_ids]
        masks = np.zeros((len(ids), *self.size), dtype=bool)
        for place, i in enumerate(ids):
            path = self._map_path(i)
            indices = _index_map(path, size=self.size)
            masks[place] = np.isin(indices, objects)
        return masks

    def check_masks(self) -> None:
        """DataError names the objects that no index map contains; usually the first frame's map suffices."""
        first = {int(anno_id): e.exp_id for e in reversed(self.expressions) for anno_id in e.anno_ids}
        held: set[int] = set()
        for i in range(len(self.frame_names)):
            if first.keys() <= held:
                return
            try:
                held.update(np.flatnonzero(np.bincount(_index_map(self._map_path(i), size=self.size).ravel())).tolist())
            except DataError:
                return  # reported when a clip or a score needs it
        for obj_id in sorted(first.keys() - held):
            grey = ": grey pictures of 0 and 255, not one index an object" if held == {0, 255} else ""
            raise DataError(
                f"{self}: expression {first[obj_id]} names object {obj_id}, which occurs in no mask of "
                f"{self._annotations}; they hold {', '.join(map(str, sorted(held - {0}))) or 'no object'}{grey}"
            )

    def masks_digest(self) -> str:
        """Hash of the names and sizes of the index maps."""
        return names_and_sizes(map(self._map_path, range(len(self.frame_names))))

    def _map_path(self, index: int) -> Path:
        assert self._annotations is not None, f"{self.video_id} has no masks"
        return self._annotations / f"{self.frame_names[index]}.png"


_index_map = lru_cache(maxsize=_MAPS_KEPT)(read_index_map)


class RefYoutubeVosSource(Source):
    """One split of a dataset in the layout of Ref-YouTube-VOS."""

    def __init__(self, root: Path, *, split: str):
        self.folder = root / split
        self._meta_path = root / _EXPRESSIONS / split / _META
        self._test_path = root / _EXPRESSIONS / "test" / _META
        self._objects_path = self.folder / "meta.json"
        self._frames, self._annotations = self.folder / "JPEGImages", self.folder / "Annotations"
        if not self._frames.is_dir():
            raise DataError(f"{self._frames}: no such folder of frames (data.root / data.split / JPEGImages)")
        entries = self._entries()
        self.has_masks = self._masks_are_public(entries)
        self._objects: dict[str, Any] | None = None
        if self.has_masks and self._objects_path.exists():
            self._objects = field(read_json(self._objects_path), "videos", dict, where=str(self._objects_path))
        self._videos: list[PaletteVideo] = []
        mistakes = Mistakes()
        for video_id, entry in entries.items():
            with mistakes:
                self._videos.append(self._video(video_id, entry))
        mistakes.refuse()
        refuse_empty(self._videos, where=self._meta_path)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        folders = [folder for folder in (root, root / _EXPRESSIONS) if folder.is_dir()]
        names = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
        return sorted(filter(is_evaluation, names))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        return listed_videos(root / _EXPRESSIONS / split / _META, root / split / "JPEGImages")

    def videos(self) -> Sequence[PaletteVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        files = [path for path in (self._meta_path, self._held_back()) if path]
        identity = {"expressions": _hash([sha256_of(path) for path in files])}
        if self.has_masks:
            identity["masks"] = _hash([video.masks_digest() for video in self._videos if video.expressions])
        return identity

    def check_expressions(self, expressions: Sequence[Expression], *, where: str) -> None:
        """Rules of a dataset that shares this layout; DataError names the field that breaks a rule."""

    def _held_back(self) -> Path | None:
        """The list of test videos; they are also listed in `valid`, but another server scores them."""
        return self._test_path if self.folder.name == "valid" and self._test_path.exists() else None

    def _entries(self) -> dict[str, Any]:
        entries = field(read_json(self._meta_path), "videos", dict, where=str(self._meta_path))
        if (path := self._held_back()) is None:
            return entries
        held_back = field(read_json(path), "videos", dict, where=str(path))
        return {video_id: entry for video_id, entry in entries.items() if video_id not in held_back}

    def _masks_are_public(self, entries: dict[str, Any]) -> bool:
        if not self._annotations.is_dir():
            if self.folder.name == "train":
                raise DataError(f"{self._annotations} is missing; it holds the masks of the split train")
            return False
        return any(
            isinstance(expression, dict) and "obj_id" in expression
            for video_id, entry in entries.items()
            for expression in field(entry, "expressions", dict, where=self._where(video_id)).values()
        )

    def _where(self, video_id: str) -> str:
        return f"{self._meta_path}: videos.{video_id}"

    def _video(self, video_id: str, entry: Any) -> PaletteVideo:
        names, expressions = read_entry(self._meta_path, video_id, entry, expression=self._expression)
        self.check_expressions(expressions, where=f"{self._where(video_id)}.expressions")
        return PaletteVideo(
            video_id,
            folder=self._frames / video_id,
            annotations=self._annotations / video_id if self.has_masks else None,
            frame_names=in_time_order(names),
            expressions=expressions,
        )

    def _expression(self, entry: Any, *, exp_id: str, text: str, video_id: str, where: str, **_: Any) -> Expression:
        return Expression(exp_id, text, self._object_of(entry, video_id=video_id, where=where))

    def _object_of(self, entry: Any, *, video_id: str, where: str) -> tuple[str, ...]:
        if not self.has_masks or entry.get("obj_id", "") in ([], None):
            return ()
        obj_id = _object_id(entry, where=where)
        if self._objects is not None:
            listed = f"{self._objects_path}: videos"
            video = field(self._objects, video_id, dict, where=listed)
            if obj_id not in field(video, "objects", dict, where=f"{listed}.{video_id}"):
                raise DataError(f"{where}.obj_id names {obj_id}, which {listed}.{video_id}.objects does not hold")
        return (obj_id,)


def _object_id(entry: Any, *, where: str) -> str:
    """The object of an expression: a palette index above 0, the background."""
    if not isinstance(entry, dict) or "obj_id" not in entry:
        raise DataError(f"{where} has no field 'obj_id'")
    obj_id = entry["obj_id"]
    text = shown(obj_id) if isinstance(obj_id, str | int) else ""
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS and 0 < int(text) <= _LARGEST_INDEX):
        raise DataError(f"{where}.obj_id is {shown(obj_id)!r}; expected one palette index, 1..{_LARGEST_INDEX}")
    return str(int(text))


def _hash(digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
