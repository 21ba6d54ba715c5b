"""JHMDB-Sentences: Rename_Images/<class>/<video>/<frame>.png from 00001, puppet_mask/.../puppet_mask.mat, one list.

jhmdb_sentences_samples_metadata.json lists [video, path of a frame, path of the masks, frames, sentence], one entry
for each annotated frame; paths begin with the dataset's folder. `part_mask` of a .mat file is [H W F]; values above 0
are the person. Follows the public loaders of ReferFormer and MTTR, and MTTR's copy of the list; pictures and masks were
not available. It is only for scoring: its one split is `test`. Refuses paths that lead out of the folder.
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.fields import check_expression, check_name, is_int
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.reading import reading, shown
from flowmask.data_pipeline.sources.base import Expression, FolderVideo, Source, names_and_sizes, refuse_empty
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_LIST, _SPLIT = "jhmdb_sentences_samples_metadata.json", "test"
_FOLDERS = ("Rename_Images", "puppet_mask")
_FILES_KEPT = 4
_LARGEST = 1 << 28  # numbers in one array
_PERSON = "0"


class JhmdbVideo(FolderVideo):
    """One folder of PNG frames; `annotated_ids` are the frames of the list's entries."""

    def __init__(self, video_id: str, *, masks: Path, annotated_ids: Sequence[int], **rest: Any):
        super().__init__(video_id, has_masks=True, **rest)
        self.masks_path, self._annotated = masks, frozenset(annotated_ids)

    def frame_path(self, index: int) -> Path:
        return self.folder / f"{self.frame_names[index]}.png"

    def annotated(self, anno_ids: Sequence[str]) -> frozenset[int]:
        return self._annotated

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        masks = np.zeros((len(ids), *self.size), dtype=bool)
        for place, i in enumerate(ids):
            if anno_ids and i in self._annotated:
                masks[place] = self._person(i)
        return masks

    def check_masks(self) -> None:
        try:
            masks = _part_masks(self.masks_path)
        except DataError:
            return  # reported when a clip or a score needs it
        if not any(masks[:, :, i].any() for i in self._annotated if i < masks.shape[2]):
            raise DataError(f"{self}: {self.masks_path} shows no person in the frames that {_LIST} names")

    def _person(self, i: int) -> NDArray[np.bool_]:
        masks = _part_masks(self.masks_path)
        if masks.shape[:2] != self.size or i >= masks.shape[2]:
            raise DataError(
                f"{self.masks_path}: {masks.shape[2]} masks of {masks.shape[0]}x{masks.shape[1]} (height x width); the "
                f"video's frames are {self.size[0]}x{self.size[1]}, and the list names frame {i + 1}"
            )
        return masks[:, :, i]


@lru_cache(maxsize=_FILES_KEPT)
def _part_masks(path: Path) -> NDArray[np.bool_]:
    """bool [H W F]."""
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    errors = (KeyError, ValueError, TypeError, NotImplementedError, EOFError, IndexError, MatReadError, zlib.error)
    with reading(path, what="MATLAB file", errors=errors) as file:
        shapes = {name: shape for name, shape, _ in whosmat(file)}  # reads only headers
        if len(shapes["part_mask"]) != 3 or math.prod(shapes["part_mask"]) > _LARGEST:
            raise ValueError(f"part_mask is {shapes['part_mask']}; expected [H W F], at most {_LARGEST} numbers")
        file.seek(0)
        masks = np.asarray(loadmat(file, variable_names=["part_mask"])["part_mask"])
        if masks.dtype.kind not in "buif":
            raise ValueError(f"part_mask is of type {masks.dtype}; expected numbers")
        return np.asarray(masks > 0)


class JhmdbSentencesSource(Source):
    """All videos of the dataset."""

    def __init__(self, root: Path, *, split: str):
        if split != _SPLIT:
            raise DataError(f"data.split is {split!r}; JHMDB-Sentences is for scoring only and has one split: {_SPLIT}")
        self._list = root / _LIST
        by_video: defaultdict[str, list[tuple[int, list[Any]]]] = defaultdict(list)
        for i, entry in enumerate(_entries(self._list)):
            by_video[check_name(entry[0], where=f"{self._list}: [{i}][0]")].append((i, entry))
        self._videos = [self._video(root, video_id, entries) for video_id, entries in by_video.items()]
        refuse_empty(self._videos, where=self._list)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        return [_SPLIT]

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        path = root / _LIST
        return frozenset(str(entry[0]) for entry in _entries(path)) if split == _SPLIT and path.is_file() else None

    def videos(self) -> Sequence[JhmdbVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        masks = names_and_sizes(video.masks_path for video in self._videos)
        return {"expressions": sha256_of(self._list), "masks": masks}

    def _video(self, root: Path, video_id: str, entries: Sequence[tuple[int, list[Any]]]) -> JhmdbVideo:
        frames: set[int] = set()
        texts: dict[str, None] = {}  # in order, each once
        first, (_, frame, masks, count, _) = entries[0]
        where = f"{self._list}: [{first}]"
        if not is_int(count) or count < 1:
            raise DataError(f"{where}[3] is {shown(count)!r}; expected the number of frames")
        folder = _inside(root, frame, where=f"{where}[1]").parent
        for i, (_, named, own_masks, own_count, text) in entries:
            where = f"{self._list}: [{i}]"
            path = _inside(root, named, where=f"{where}[1]")
            if (path.parent, own_masks, own_count) != (folder, masks, count):
                raise DataError(f"{where} has another folder, masks or number of frames than [{first}], of one video")
            if not path.stem.isdecimal() or not 1 <= int(path.stem) <= count:
                raise DataError(f"{where}[1] names frame {path.name[:40]!r}; the video has {count}, from 00001")
            frames.add(int(path.stem) - 1)
            texts[check_expression(text, where=f"{where}[4]")] = None
        return JhmdbVideo(
            video_id,
            folder=folder,
            frame_names=[f"{i + 1:05d}" for i in range(count)],
            expressions=[Expression(str(number), text, (_PERSON,)) for number, text in enumerate(texts)],
            masks=_inside(root, masks, where=f"{where}[2]"),
            annotated_ids=sorted(frames),
        )


def _entries(path: Path) -> list[list[Any]]:
    listed = read_json(path)
    if not isinstance(listed, list):
        raise DataError(f"{path} holds a {type(listed).__name__}; expected a list")
    for i, entry in enumerate(listed):
        if not isinstance(entry, list) or len(entry) != 5:
            raise DataError(f"{path}: [{i}] is {shown(entry)!r}; expected [video, frame, masks, frames, sentence]")
    return listed


def _inside(root: Path, listed: Any, *, where: str) -> Path:
    """The file in `root` for a listed path, which begins with the original name of the dataset's folder."""
    parts = PurePosixPath(check_name(listed, where=where)).parts
    start = next((place for place, part in enumerate(parts) if part in _FOLDERS), None)
    if start is None or ".." in parts:
        raise DataError(f"{where} is {shown(listed)!r}; expected a path in {' or '.join(_FOLDERS)}")
    return root.joinpath(*parts[start:])
