"""A2D-Sentences: Release/clips320H/<video>.mp4, a list of sentences for each split, and masks as MATLAB's HDF5.

a2d_sentences_single_frame_{train,test}_annotations.json lists [sentence, video, frame from 1, instance], one entry
for each annotated frame of the instance; text_annotations/a2d_annotation_with_instances/<video>/<frame>.h5
holds `instance` [n] and `reMask` [n W H], or [W H] if n is 1. Follows the public loaders of ReferFormer and MTTR;
the dataset's files were not available. Needs h5py. Refuses instances that are missing in a frame's file.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.fields import check_expression, check_inside, check_name, is_int
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.reading import Mistakes, reading, shown
from flowmask.data_pipeline.sources.base import Expression, Source, names_and_sizes, refuse_empty
from flowmask.data_pipeline.sources.videos import FileVideo
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_VIDEOS, _MASKS = "Release/clips320H", "text_annotations/a2d_annotation_with_instances"
_SPLITS = ("train", "test")
_FILES_KEPT = 32
_LARGEST = 1 << 26  # numbers in one array
_Instances = dict[int, NDArray[np.bool_]]


class A2dVideo(FileVideo):
    """One video; a sentence is annotated only in the few frames of its entries."""

    has_masks = True

    def __init__(self, root: Path, video_id: str, entries: Sequence[tuple[str, int, int]]):
        """entries: sentence, frame from 1, instance."""
        self.video_id, self.path = video_id, root / _VIDEOS / f"{video_id}.mp4"
        self._masks = root / _MASKS / video_id
        self._frames: defaultdict[str, set[int]] = defaultdict(set)
        for _, frame, instance in entries:
            self._frames[str(instance)].add(frame - 1)
        distinct = dict.fromkeys((text, str(instance)) for text, _, instance in entries)
        self.expressions = tuple(
            Expression(str(number), text, (instance,)) for number, (text, instance) in enumerate(distinct)
        )

    def annotated(self, anno_ids: Sequence[str]) -> set[int]:
        frames: set[int] = set().union(*(self._frames[anno_id] for anno_id in anno_ids or self._frames))
        if max(frames) >= len(self.frame_names):
            raise DataError(
                f"{self}: the list names frame {max(frames) + 1}, but {self.path} has {len(self.frame_names)}"
            )
        return frames

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for place, i in enumerate(ids):
            for anno_id in anno_ids:
                if i in self._frames[anno_id]:
                    union[place] |= self._instance(anno_id, self._mask_path(i))
        return union

    def check_masks(self) -> None:
        for anno_id, frames in self._frames.items():
            for path in map(self._mask_path, sorted(frames)):
                try:
                    held = _instances(path)
                except DataError:
                    continue  # reported when a clip or a score needs it
                self._refuse_other(anno_id, held, path)

    def _instance(self, anno_id: str, path: Path) -> NDArray[np.bool_]:
        """bool [H W] of one instance in one frame."""
        held = _instances(path)
        self._refuse_other(anno_id, held, path)
        mask = held[int(anno_id)]
        if mask.shape != self.size:
            raise DataError(
                f"{path}: the masks are {mask.shape[0]}x{mask.shape[1]} (height x width), its video "
                f"{self.size[0]}x{self.size[1]}"
            )
        return mask

    def _refuse_other(self, anno_id: str, held: _Instances, path: Path) -> None:
        if int(anno_id) not in held:
            known = ", ".join(map(str, sorted(held)))
            raise DataError(f"{self}: a sentence names instance {anno_id}, which {path} does not hold; it has {known}")

    def _mask_path(self, i: int) -> Path:
        return self._masks / f"{i + 1:05d}.h5"

    def masks_digest(self) -> str:
        """Hash of the names and sizes of the mask files."""
        return names_and_sizes(map(self._mask_path, sorted(set().union(*self._frames.values()))))


def _h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError:
        raise DataError("A2D's masks are HDF5 files, which need h5py: pip install 'flowmask[a2d]'") from None
    return h5py


@lru_cache(maxsize=_FILES_KEPT)
def _instances(path: Path) -> _Instances:
    """Masks [H W] of one annotated frame by instance."""
    errors = (KeyError, ValueError, TypeError)
    with reading(path, what="A2D mask", errors=errors) as opened, _h5py().File(opened, "r") as file:
        instances, masks = (_own_data(file, name) for name in ("instance", "reMask"))
        instances, masks = instances.ravel(), masks[None] if masks.ndim == 2 else masks
        if masks.ndim != 3 or len(masks) != len(instances):
            raise ValueError(f"{len(instances)} instances, but reMask is {masks.shape}")
        return {int(number): mask.T > 0 for number, mask in zip(instances, masks, strict=True)}


def _own_data(file: Any, name: str) -> NDArray[Any]:
    """An array stored in the file itself: HDF5 can refer to other files, and state a size above that of its data."""
    h5py = _h5py()
    data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual or data.dtype.kind not in "buif":
        raise ValueError(f"{name} is not an array of numbers in the file itself")
    if data.size > _LARGEST:
        raise ValueError(f"{name} has {data.size} numbers, more than any mask of A2D")
    return np.asarray(data)


class A2dSentencesSource(Source):
    """`train` or `test`."""

    def __init__(self, root: Path, *, split: str):
        if split not in _SPLITS:
            raise DataError(f"data.split is {split!r}; A2D-Sentences has {' and '.join(_SPLITS)}")
        _h5py()
        self._list = _list_of(root, split)
        by_video: defaultdict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for video_id, text, frame, instance in _entries(self._list):
            by_video[video_id].append((text, frame, instance))
        self._videos = [A2dVideo(root, video_id, entries) for video_id, entries in by_video.items()]
        refuse_empty(self._videos, where=self._list)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        return ["test"] if _list_of(root, "test").is_file() else []

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        path = _list_of(root, split)
        return frozenset(entry[0] for entry in _entries(path)) if path.is_file() else None

    def videos(self) -> Sequence[A2dVideo]:
        return self._videos

    def identity(self) -> dict[str, str]:
        masks = "\n".join(video.masks_digest() for video in self._videos)
        return {"expressions": sha256_of(self._list), "masks": hashlib.sha256(masks.encode()).hexdigest()}


def _list_of(root: Path, split: str) -> Path:
    return root / f"a2d_sentences_single_frame_{split}_annotations.json"


def _entries(path: Path) -> list[tuple[str, str, int, int]]:
    """Video id, sentence, frame from 1 and instance of each entry of a list."""
    listed = read_json(path)
    if not isinstance(listed, list):
        raise DataError(f"{path} holds a {type(listed).__name__}; expected a list")
    entries: list[tuple[str, str, int, int]] = []
    mistakes = Mistakes()
    for i, entry in enumerate(listed):
        with mistakes:
            entries.append(_entry(entry, where=f"{path}: [{i}]"))
    mistakes.refuse()
    return entries


def _entry(entry: Any, *, where: str) -> tuple[str, str, int, int]:
    if not isinstance(entry, list) or len(entry) != 4:
        raise DataError(f"{where} is {shown(entry)!r}; expected [sentence, video, frame, instance]")
    text, video_id, frame, instance = entry
    if not is_int(frame) or frame < 1 or not is_int(instance):
        raise DataError(f"{where} has frame {shown(frame)!r} and instance {shown(instance)!r}; expected numbers")
    name = check_inside(check_name(video_id, where=f"{where}[1]"), where=f"{where}[1]")
    return name, check_expression(text, where=f"{where}[0]"), frame, instance
