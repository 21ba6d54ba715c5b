"""Video files listed in a JSONL, one video per line.

{"video": path, "video_id"?, "annotated"?, "expressions": [{"exp_id"?, "text", "masks"?}]}; paths are relative to
the JSONL's folder. `masks` is a list of COCO RLE (or null) per frame, a folder of PNG files (sorted by the numbers in
their names), or a list of PNG paths; any value above 0 is the object. [] says that the sentence names nothing.
`annotated` lists the frames, from 0, with known masks; by default all. `masks` may have only these frames.
A cache needs masks, prediction does not. Only a line feed ends a line, because other line separators may occur in a
sentence.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats import rle
from flowmask.data_pipeline.formats.fields import (
    check_expression,
    check_name,
    check_path,
    field,
    is_int,
    refuse_misspelt,
    refuse_twice,
)
from flowmask.data_pipeline.formats.json_file import json_lines, parse
from flowmask.data_pipeline.formats.picture import pictures_in, read_object_mask
from flowmask.data_pipeline.formats.reading import Mistakes, open_file, shown
from flowmask.data_pipeline.sources.base import (
    Expression,
    Frame,
    Source,
    Video,
    is_evaluation,
    names_and_sizes,
    refuse_empty,
)
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of, sha256_of_open

if TYPE_CHECKING:
    from flowmask.data_pipeline.video.video_file import VideoFile

_LINE = 'a line is one video, {"video": PATH, "expressions": [...]}: docs/datasets.md, Your own data'


@lru_cache(maxsize=2)
def _opened(path: Path, allow_truncated: bool) -> "VideoFile":
    """The last used videos stay open: clips of one video follow each other."""
    from flowmask.data_pipeline.video.video_file import VideoFile  # PyAV, which a training rank never needs

    return VideoFile(path, allow_truncated=allow_truncated)


class FileVideo(Video):
    """A video that is one file, `path`; opened when its frames, their number or their size are needed."""

    path: Path
    allow_truncated = False  # data.allow_truncated

    @property
    def _file(self) -> "VideoFile":
        return _opened(self.path, self.allow_truncated)

    @cached_property
    def _facts(self) -> tuple[int, tuple[int, int]]:
        """Number and size of the frames; kept, so that planning needs no open file."""
        return len(self._file), self._file.size

    @cached_property
    def frame_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{i:05d}" for i in range(self._facts[0]))

    @property
    def size(self) -> tuple[int, int]:
        return self._facts[1]

    def frames(self, ids: Sequence[int]) -> list[Frame]:
        return self._file.frames(ids)

    def files_digest(self) -> str:
        return names_and_sizes([self.path])


class ListedVideo(FileVideo):
    """One line of the list."""

    def __init__(self, entry: dict[str, Any], *, folder: Path, where: str):
        self._folder, self._where = folder, where
        refuse_misspelt(entry, ("video", "video_id", "annotated", "expressions"), where=where)
        spot = f"{where}: video"
        self.path = folder / check_path(check_name(field(entry, "video", str, where=where), where=spot), where=spot)
        self.video_id = check_name(entry.get("video_id", self.path.stem), where=f"{where}: video_id")
        listed = field(entry, "expressions", list, where=where)
        self._masks: dict[str, Any] = {}
        self._empty: dict[str, int] = {}  # expression id -> number of its masks, if all are empty
        self.expressions = tuple(self._expression(number, item) for number, item in enumerate(listed))
        refuse_twice((e.exp_id for e in self.expressions), where=f"{where}: exp_id", said="names two expressions")
        without = [e.exp_id for e, item in zip(self.expressions, listed, strict=True) if item.get("masks") is None]
        self.has_masks = not without
        if without and len(without) < len(listed):
            raise DataError(
                f"{where}: expression {without[0]} has no masks, others have; give them, or [] if it names nothing"
            )
        self._annotated = self._listed_frames(entry.get("annotated"))

    def _expression(self, number: int, item: Any) -> Expression:
        where = f"{self._where}: expressions[{number}]"
        refuse_misspelt(item, ("exp_id", "text", "masks"), where=where)
        text = check_expression(field(item, "text", str, where=where), where=f"{where}.text")
        exp_id = check_name(item.get("exp_id", number), where=f"{where}.exp_id")
        masks = item.get("masks")
        if masks == "":
            raise DataError(f"{where}.masks is ''; expected a folder, a list, or [] if the sentence names nothing")
        if masks is None or masks == []:
            return Expression(exp_id, text, ())
        if isinstance(masks, list) and all(map(rle.is_empty, masks)):
            self._empty[exp_id] = len(masks)
            return Expression(exp_id, text, ())
        for mask in masks if isinstance(masks, list) else [masks]:
            if isinstance(mask, str):
                check_path(check_name(mask, where=f"{where}.masks"), where=f"{where}.masks")
        # Sentences of one video with identical masks mean the same object, which is encoded once.
        try:
            spelled = json.dumps(masks, sort_keys=True)
        except RecursionError:
            raise DataError(f"{where}.masks is {shown(masks)!r}; expected masks") from None
        anno_id = hashlib.sha256(spelled.encode()).hexdigest()[:16]
        self._masks[anno_id] = masks
        return Expression(exp_id, text, (anno_id,))

    def _listed_frames(self, listed: Any) -> tuple[int, ...] | None:
        where = f"{self._where}: annotated"
        if listed is None:
            return None
        right = isinstance(listed, list) and all(is_int(i) and i >= 0 for i in listed)
        if not right or not listed or listed != sorted(set(listed)):
            raise DataError(f"{where} is {shown(listed)!r}; expected frame numbers from 0, rising, at least one")
        return tuple(listed)

    def annotated(self, anno_ids: Sequence[str]) -> tuple[int, ...] | None:
        if self._annotated is not None and self._annotated[-1] >= self._facts[0]:
            raise DataError(
                f"{self._where}: annotated names frame {self._annotated[-1]}; {self.path} ends at {self._facts[0] - 1}"
            )
        return self._annotated

    def check_masks(self) -> None:
        try:
            known = self.annotated(()) or range(self._facts[0])
            absent = [
                f"the masks of expression {e.exp_id} show nothing in any frame; [] says that a sentence names nothing"
                for e in self.expressions
                if e.anno_ids and not any(self.mask(e.anno_ids, [i]).any() for i in known)
            ]
            absent += [
                f"{count} masks for the {self._facts[0]} frames of {self.path}"
                for count in self._empty.values()
                if count not in (len(known), self._facts[0])
            ]
        except DataError:
            return
        if absent:
            raise DataError(f"{self._where}: {absent[0]}")

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            masks = self._listed_masks(anno_id)
            for place, i in enumerate(ids):
                union[place] |= self._frame_mask(masks.get(i), where=f"{self._where}: masks, frame {i}")
        return union

    def _listed_masks(self, anno_id: str) -> dict[int, Any]:
        """The mask of each annotated frame."""
        masks = self._masks[anno_id]
        if isinstance(masks, str):
            masks = self._pngs_in(masks)
        known = self.annotated(()) or range(self._facts[0])
        if self.allow_truncated and isinstance(masks, list) and not self._annotated:
            masks = masks[: len(known)]  # a truncated video lost the frames of the last masks
        if not isinstance(masks, list) or len(masks) not in (len(known), self._facts[0]):
            count = len(masks) if isinstance(masks, list) else "no list of"
            of = f" of which {len(known)} are annotated" if self._annotated else ""
            raise DataError(f"{self._where}: {count} masks for the {self._facts[0]} frames of {self.path}{of}")
        return dict(zip(known, masks)) if len(masks) == len(known) else {i: masks[i] for i in known}

    def _frame_mask(self, mask: Any, *, where: str) -> NDArray[np.bool_]:
        if isinstance(mask, str | Path):  # a name in the list, or a file of a listed folder
            try:
                return read_object_mask(mask if isinstance(mask, Path) else self._folder / mask, size=self.size)
            except DataError as error:  # the list may name a file anywhere
                raise DataError(f"{where}: {error}") from error
        return rle.decode(mask, size=self.size, where=where)

    def _pngs_in(self, name: str) -> list[Path]:
        try:
            return pictures_in(self._folder / name, suffixes=(".png",))
        except OSError as error:
            raise DataError(f"{self._where}: masks: {self._folder / name}: {error.strerror}") from error

    @cached_property
    def _missing_mask(self) -> Path | None:
        named = (one for masks in self._masks.values() for one in (masks if isinstance(masks, list) else [masks]))
        paths = (self._folder / name for name in named if isinstance(name, str))
        return next((path for path in paths if not path.exists()), None)

    def missing_file(self, ids: Sequence[int]) -> Path | None:
        return self._missing_mask

    def mask_files(self) -> Iterator[Path]:
        """The PNG files with masks of this video; none of a folder that cannot be listed."""
        for masks in self._masks.values():
            if isinstance(masks, list):
                yield from (self._folder / mask for mask in masks if isinstance(mask, str))
            elif isinstance(masks, str):
                with suppress(DataError):
                    yield from self._pngs_in(masks)


class VideosSource(Source):
    """`root` is the JSONL file, or a folder with {split}.jsonl."""

    def __init__(self, root: Path, *, split: str):
        self.path = _list_of(root, split)
        self._videos: list[ListedVideo] = []
        mistakes = Mistakes()
        for where, line in json_lines(self.path, shape=_LINE):
            with mistakes:
                self._videos.append(ListedVideo(_parsed(line, where), folder=self.path.parent, where=where))
        mistakes.refuse()
        refuse_empty(self._videos, where=self.path)
        ids = (video.video_id for video in self._videos)
        refuse_twice(ids, where=f"{self.path}: video_id", said="names two videos; give each line its own")

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """The lists in the same folder; if `root` is a file, only this file."""
        return sorted(path.stem for path in root.glob("*.jsonl") if is_evaluation(path.stem))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        path = _list_of(root, split)
        if not path.is_file():
            return None
        entries = ((where, _parsed(line, where)) for where, line in json_lines(path, shape=_LINE))
        return frozenset(str(e.get("video_id", Path(field(e, "video", str, where=w)).stem)) for w, e in entries)

    @classmethod
    def is_scored(cls, root: Path, split: str) -> bool:
        return is_evaluation(_list_of(root, split).stem)

    def videos(self) -> Sequence[ListedVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        digest = sha256_of(self.path)
        identity = {"expressions": digest, "masks": digest}
        files = [path for video in self._videos for path in video.mask_files()]
        if files:
            identity["mask_files"] = _contents(files, below=self.path.parent)
        return identity


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    """The object of a line."""
    try:
        entry = parse(line)
    except json.JSONDecodeError as error:  # its own message names line 1: that of this text
        raise DataError(f"{where}: no valid JSON ({error.msg}: column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({' '.join(str(error).split())})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {shown(entry)!r} and has no field 'video'; expected one video")
    return entry


def _contents(files: Sequence[Path], *, below: Path) -> str:
    """Hash of files by name and content, because a replaced mask often has the same size."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with open_file(path) as file:
                content = sha256_of_open(file)
        except OSError:
            content = "missing"  # quarantined later
        digest.update(f"{os.path.relpath(path, below)} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _list_of(root: Path, split: str) -> Path:
    return root / f"{split}.jsonl" if root.is_dir() else root
