"""A layout of video files: SPLIT.csv has the columns file, sentence, object; without an object nothing is named.

clips/FILE is a video; masks/FILE/OBJECT/00000.png, 00001.png, ... are the masks of its frames.
"""

import csv
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.picture import read_object_mask
from flowmask.data_pipeline.sources.base import Expression, Source, is_evaluation, names_and_sizes
from flowmask.data_pipeline.sources.videos import FileVideo
from flowmask.models.errors import DataError


class PierVideo(FileVideo):
    """One file of clips/. FileVideo reads its frames, their number and their size."""

    has_masks = True

    def __init__(self, root: Path, file: str, rows: Sequence[dict[str, str]]) -> None:
        """rows: those of the list for this file."""
        self.path, self.video_id, self._masks = root / "clips" / file, file, root / "masks" / file
        named = [(row["sentence"], (row["object"],) if row["object"] else ()) for row in rows]
        self.expressions = tuple(Expression(str(number), *each) for number, each in enumerate(named))

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        """Bool [n H W] of frame numbers `ids`: the union of the objects; without objects all false."""
        union = np.zeros((len(ids), *self.size), dtype=bool)
        for anno_id in anno_ids:
            for place, i in enumerate(ids):
                union[place] |= read_object_mask(self._masks / anno_id / f"{i:05d}.png", size=self.size)
        return union

    def files_digest(self) -> str:
        """A hash of names and sizes of the video and its masks, for the fingerprint."""
        return names_and_sizes([self.path, *sorted(self._masks.rglob("*.png"))])


class PierSource(Source):
    """One split: the videos of its list."""

    family = "pier"

    def __init__(self, root: Path, *, split: str) -> None:
        self._list = root / f"{split}.csv"
        by_file: dict[str, list[dict[str, str]]] = {}
        for row in _rows(self._list):
            by_file.setdefault(row["file"], []).append(row)
        self._videos = [PierVideo(root, file, rows) for file, rows in by_file.items()]

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """The splits that are there to be scored on."""
        return sorted(path.stem for path in root.glob("*.csv") if is_evaluation(path.stem))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        """Video ids of a split; None if it has no list."""
        path = root / f"{split}.csv"
        return frozenset(row["file"] for row in _rows(path)) if path.is_file() else None

    def videos(self) -> Sequence[PierVideo]:
        """In the order of the list."""
        return self._videos

    def identity(self) -> dict[str, str]:
        """A hash of the list, for the fingerprint."""
        return {"expressions": sha256(self._list.read_bytes()).hexdigest()}


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; data.split names a list, SPLIT.csv in data.root") from error
    for number, row in enumerate(rows, start=1):
        if not row.get("file") or not row.get("sentence") or row.get("object") is None:
            raise DataError(f"{path}: row {number} lacks file, sentence or object; an empty object names nothing")
    return rows
