"""Long-RVOS: <split>/JPEGImages/<video>/<frame>.jpg, meta_expressions.json, Annotations/<video>/<object>/<frame>.png.

An expression names one object in `obj_id`, or nothing: [] or null. Every value above 0 in its picture is the object;
a frame without a picture does not show it. `type` is static, dynamic or static+dynamic; it is optional in lists
that are not scored. Follows the loaders of iSEE-Laboratory/Long_RVOS at 447682a4:
datasets/long_rvos/long_rvos_dataset.py and eval/eval_long_rvos/eval_{static,dynamic,hybrid}.py. The files themselves
were not available; that loader has no sentence that names nothing. frame_types.json and motions are not read.
Refuses `train` without Annotations.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.fields import check_inside, check_name, field
from flowmask.data_pipeline.formats.meta_expressions import kind_of, read_entry
from flowmask.data_pipeline.formats.names import in_time_order
from flowmask.data_pipeline.formats.picture import pictures_in, read_object_mask
from flowmask.data_pipeline.sources.base import Expression, FolderVideo, is_evaluation, names_and_sizes
from flowmask.data_pipeline.sources.mevis import SplitFolder
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_KINDS = {kind: kind for kind in ("static", "dynamic", "static+dynamic")}


class ObjectFoldersVideo(FolderVideo):
    """Frames, and a folder of masks for each object; `annotations` is None if masks are not public."""

    def __init__(self, video_id: str, *, annotations: Path | None, **rest: Any):
        super().__init__(video_id, has_masks=annotations is not None, **rest)
        self._annotations = annotations

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            for place, i in enumerate(ids):
                if (path := self._pictures[anno_id].get(self.frame_names[i])) is not None:
                    union[place] |= read_object_mask(path, size=self.size)
        return union

    def check_masks(self) -> None:
        """DataError names an object without a mask in any picture; usually the first picture suffices."""
        first = {anno_id: e.exp_id for e in reversed(self.expressions) for anno_id in e.anno_ids}
        for anno_id, exp_id in first.items():
            try:
                if self._is_shown(anno_id):
                    continue
            except DataError:
                return  # reported when a clip or a score needs it
            raise DataError(
                f"{self}: expression {exp_id} names object {anno_id}, which no picture of a frame in "
                f"{self._annotations}/{anno_id} shows; the folders there are {', '.join(self._folders()) or 'none'}"
            )

    def masks_digest(self) -> str:
        """Hash of the names and sizes of the pictures, by object."""
        digests = (names_and_sizes(found.values()) for found in self._pictures.values())
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @cached_property
    def _pictures(self) -> dict[str, dict[str, Path]]:
        """By object, in the order of the sentences, and by frame name; empty if the folder is missing."""
        assert self._annotations is not None, f"{self.video_id} has no masks"
        pictures: dict[str, dict[str, Path]] = {a: {} for e in self.expressions for a in e.anno_ids}
        for anno_id, found in pictures.items():
            with suppress(OSError):
                found |= {path.stem: path for path in pictures_in(self._annotations / anno_id, suffixes=(".png",))}
        return pictures

    def _is_shown(self, anno_id: str) -> bool:
        frames = (i for i, name in enumerate(self.frame_names) if name in self._pictures[anno_id])
        return any(self.mask([anno_id], [i]).any() for i in frames)

    def _folders(self) -> list[str]:
        assert self._annotations is not None, f"{self.video_id} has no masks"
        folder = self._annotations
        return in_time_order(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


class LongRvosSource(SplitFolder[ObjectFoldersVideo]):
    """One split folder of Long-RVOS."""

    holds = "a split of Long-RVOS holds JPEGImages, Annotations (if public), meta_expressions.json"

    def open_masks(self) -> None:
        self._annotations = self.folder / "Annotations"
        self.has_masks = self._annotations.is_dir()
        if not self.has_masks and self.split == "train":
            raise DataError(f"{self._annotations} is missing; it holds the masks of the split train")

    def identity(self) -> dict[str, str]:
        identity = {"expressions": sha256_of(self.meta_path)}
        if self.has_masks:
            digests = "\n".join(video.masks_digest() for video in self.videos() if video.expressions)
            identity["masks"] = hashlib.sha256(digests.encode()).hexdigest()
        return identity

    def video(self, video_id: str, entry: Any) -> ObjectFoldersVideo:
        names, expressions = read_entry(self.meta_path, video_id, entry, expression=self._expression)
        return ObjectFoldersVideo(
            video_id,
            folder=self.frames / video_id,
            annotations=self._annotations / video_id if self.has_masks else None,
            frame_names=in_time_order(names),
            expressions=expressions,
        )

    def _expression(self, entry: Any, *, exp_id: str, text: str, where: str, **_: Any) -> Expression:
        scored = self.has_masks and is_evaluation(self.split)
        kind = kind_of(entry, "type", _KINDS, required=scored, where=where)
        obj_id = field(entry, "obj_id", object, where=where) if self.has_masks else None
        if obj_id is None or obj_id == []:
            return Expression(exp_id, text, (), kind)
        name = check_inside(check_name(obj_id, where=f"{where}.obj_id"), where=f"{where}.obj_id")
        if "/" in name:
            raise DataError(f"{where}.obj_id is {name[:40]!r}; expected the name of one folder")
        return Expression(exp_id, text, (name,), kind)
