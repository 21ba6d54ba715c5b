"""MeViS: {split}/JPEGImages/<video>/<frame>.jpg, meta_expressions.json and mask_dict.json (if public).

Refuses missing files and fields, masks that do not fit their video, sentences without words and a split
without any.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import rle
from data_pipeline.sources.base import (
    Expression,
    FolderVideo,
    Source,
    check_expression,
    check_name,
    check_names,
    field,
    hash_file,
    read_json,
    refuse_empty,
)
from models.errors import DataError

_META, _MASKS, _FRAMES = "meta_expressions.json", "mask_dict.json", "JPEGImages"


class MevisVideo(FolderVideo):
    """One folder of JPEG frames; `masks` is the split's annotation table, None where masks are not public."""

    def __init__(
        self,
        video_id: str,
        *,
        folder: Path,
        frame_names: Sequence[str],
        expressions: Sequence[Expression],
        masks: dict[str, list[Any]] | None,
        masks_path: Path,
    ):
        super().__init__(
            video_id,
            folder=folder,
            frame_names=frame_names,
            expressions=expressions,
            has_masks=masks is not None,
        )
        self._masks, self._masks_path = masks, masks_path

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        assert self._masks is not None, f"{self.video_id} has no masks"
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            for place, i in enumerate(ids):
                where = f"{self._masks_path}: annotation {anno_id}, frame {self.frame_names[i]}"
                if (mask := self._masks[anno_id][i]) is not None:
                    union[place] |= rle.decode(mask, size=self.size, where=where)
        return union


class MevisSource(Source):
    """One split folder in the MeViS layout."""

    def __init__(self, root: Path, *, split: str):
        self.folder = root / split
        if not self.folder.is_dir():
            found = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else None
            hint = f"; {root} holds {', '.join(found) or 'no folder'}" if found is not None else ""
            raise DataError(f"{self.folder}: no such dataset folder (data.root / data.split){hint}")
        self._meta_path, self._masks_path = self.folder / _META, self.folder / _MASKS
        if not (self.folder / _FRAMES).is_dir():
            raise DataError(
                f"{self.folder / _FRAMES} is missing; a MeViS split holds {_FRAMES}, {_META}, {_MASKS}"
            )
        self._masks: dict[str, list[Any]] | None = None
        if self._masks_path.exists():
            self._masks = read_json(self._masks_path)
            if not isinstance(self._masks, dict):
                raise DataError(f"{self._masks_path}: expected an object of annotation ids")
        entries = field(read_json(self._meta_path), "videos", dict, where=str(self._meta_path))
        self._videos = [self._video(video_id, entry) for video_id, entry in entries.items()]
        refuse_empty(self._videos, where=self._meta_path)

    def videos(self) -> Sequence[MevisVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        identity = {"expressions": hash_file(self._meta_path)}
        if self._masks is not None:
            identity["masks"] = hash_file(self._masks_path)
        return identity

    def _video(self, video_id: str, entry: Any) -> MevisVideo:
        check_name(video_id, where=f"{self._meta_path}: an id in videos")
        where = f"{self._meta_path}: videos.{video_id}"
        names = sorted(check_names(field(entry, "frames", list, where=where), where=f"{where}.frames"))
        if not names:
            raise DataError(f"{where}.frames is empty")
        expressions = [
            self._expression(
                check_name(exp_id, where=f"{where}: an id in expressions"),
                expression,
                frames=len(names),
                where=f"{where}.expressions.{exp_id}",
            )
            for exp_id, expression in field(entry, "expressions", dict, where=where).items()
        ]
        return MevisVideo(
            video_id,
            folder=self.folder / _FRAMES / video_id,
            frame_names=names,
            expressions=expressions,
            masks=self._masks,
            masks_path=self._masks_path,
        )

    def _expression(self, exp_id: str, entry: Any, *, frames: int, where: str) -> Expression:
        text = check_expression(field(entry, "exp", str, where=where), where=f"{where}.exp")
        if self._masks is None:
            return Expression(exp_id, text, ())
        anno_ids = tuple(check_names(field(entry, "anno_id", list, where=where), where=f"{where}.anno_id"))
        if not anno_ids:
            raise DataError(f"{where}.anno_id is empty; an expression must mean at least one annotation")
        for anno_id in anno_ids:
            masks = self._masks.get(anno_id)
            if masks is None:
                raise DataError(f"{where}.anno_id names {anno_id}, which {self._masks_path} does not hold")
            if not isinstance(masks, list) or len(masks) != frames:
                count = len(masks) if isinstance(masks, list) else "no list of"
                raise DataError(
                    f"{self._masks_path}: annotation {anno_id} has {count} masks, its video {frames} frames"
                )
        return Expression(exp_id, text, anno_ids)
