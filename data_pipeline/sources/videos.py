"""Video files listed in a JSONL, one video a line, read with decord.

{"video": path, "video_id"?, "expressions": [{"exp_id"?, "text", "masks"?}]}; paths are relative to the
JSONL's folder. `masks` is a list of COCO RLE (or null) per frame, a folder of PNG files in frame order, or
a list of PNG paths; any value above 0 is the object. Needed by a cache, not by prediction.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.formats.video_file import VideoFile
from flowmask.data_pipeline.sources.base import (
    Expression,
    Frame,
    Source,
    Video,
    check_expression,
    check_name,
    field,
    is_evaluation,
    names_and_sizes,
    read_image,
    refuse_empty,
)
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of
from flowmask.models.stored.sealed import parse_json


@lru_cache(maxsize=2)
def _opened(path: Path) -> VideoFile:
    """The videos used last stay open: clips of one video follow each other."""
    return VideoFile(path)


class ListedVideo(Video):
    """One line of the list; the file is opened when its frames, their number or their size are asked for."""

    def __init__(self, entry: dict[str, Any], *, folder: Path, where: str):
        self._folder, self._where = folder, where
        self.path = folder / check_name(field(entry, "video", str, where=where), where=f"{where}: video")
        self.video_id = check_name(entry.get("video_id", self.path.stem), where=f"{where}: video_id")
        listed = field(entry, "expressions", list, where=where)
        self._masks: dict[str, Any] = {}
        self.expressions = tuple(self._expression(number, item) for number, item in enumerate(listed))
        self.has_masks = all(expression.anno_ids for expression in self.expressions)

    def _expression(self, number: int, item: Any) -> Expression:
        where = f"{self._where}: expressions[{number}]"
        text = check_expression(field(item, "text", str, where=where), where=f"{where}.text")
        exp_id = check_name(item.get("exp_id", number), where=f"{where}.exp_id")
        masks = item.get("masks")
        if masks is None:
            return Expression(exp_id, text, ())
        # Sentences of one video that spell the same masks mean the same object: it is encoded once.
        anno_id = hashlib.sha256(json.dumps(masks, sort_keys=True).encode()).hexdigest()[:16]
        self._masks[anno_id] = masks
        return Expression(exp_id, text, (anno_id,))

    @property
    def _file(self) -> VideoFile:
        return _opened(self.path)

    @cached_property
    def _facts(self) -> tuple[int, tuple[int, int]]:
        """Number of frames and their size; kept, so that planning needs no file to stay open."""
        return len(self._file), self._file.size

    @cached_property
    def frame_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{i:05d}" for i in range(self._facts[0]))

    @property
    def size(self) -> tuple[int, int]:
        return self._facts[1]

    def frames(self, ids: Sequence[int]) -> list[Frame]:
        return self._file.frames(ids)

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            masks = self._listed_masks(anno_id)
            for place, i in enumerate(ids):
                union[place] |= self._frame_mask(masks[i], where=f"{self._where}: masks, frame {i}")
        return union

    def _listed_masks(self, anno_id: str) -> list[Any]:
        masks = self._masks[anno_id]
        if isinstance(masks, str):
            folder = self._folder / check_name(masks, where=f"{self._where}: masks")
            masks = [str(path) for path in sorted(folder.glob("*.png"))]
        if not isinstance(masks, list) or len(masks) != self._facts[0]:
            count = len(masks) if isinstance(masks, list) else "no list of"
            raise DataError(f"{self._where}: {count} masks for the {self._facts[0]} frames of {self.path}")
        return masks

    def _frame_mask(self, mask: Any, *, where: str) -> NDArray[np.bool_]:
        if isinstance(mask, str):
            path = self._folder / check_name(mask, where=where)
            return np.asarray(read_image(path, size=self.size).any(axis=2))
        return rle.decode(mask, size=self.size, where=where)

    def files_digest(self) -> str:
        return names_and_sizes([self.path])


class VideosSource(Source):
    """`root` is the JSONL file, or a folder that holds {split}.jsonl."""

    def __init__(self, root: Path, *, split: str):
        self.path = _list_of(root, split)
        try:
            lines = self.path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: the list of videos cannot be read: {error}") from error
        self._videos = [self._video(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        refuse_empty(self._videos, where=self.path)
        ids = [video.video_id for video in self._videos]
        if twice := next((video_id for video_id in ids if ids.count(video_id) > 1), None):
            raise DataError(f"{self.path}: two videos are called {twice!r}; give each line its own video_id")

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """The lists in the same folder; a `root` that is a file stands alone."""
        return sorted(path.stem for path in root.glob("*.jsonl") if is_evaluation(path.stem))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        path = _list_of(root, split)
        if not path.is_file():
            return None
        try:
            entries = [parse_json(line) for line in path.read_text().splitlines() if line.strip()]
            return frozenset(str(e.get("video_id", Path(e["video"]).stem)) for e in entries)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{path}: a line is no video, so leaks cannot be looked for ({error})") from error

    @classmethod
    def is_scored(cls, root: Path, split: str) -> bool:
        return is_evaluation(_list_of(root, split).stem)

    def _video(self, number: int, line: str) -> ListedVideo:
        where = f"{self.path}:{number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: no valid JSON ({error})") from error
        return ListedVideo(entry, folder=self.path.parent, where=where)

    def videos(self) -> Sequence[ListedVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        digest = sha256_of(self.path)
        return {"expressions": digest, "masks": digest}


def _list_of(root: Path, split: str) -> Path:
    return root / f"{split}.jsonl" if root.is_dir() else root
