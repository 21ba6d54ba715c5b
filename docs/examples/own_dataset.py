"""A layout of one text file: a line is "SPLIT VIDEO SENTENCE"; VIDEO/ holds frames (.jpg) with masks beside (.png)."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.sources.base import Expression, FolderVideo, Source, Video, is_evaluation, read_image


class BeachVideo(FolderVideo):
    """Frames are pictures of one folder; every frame has a mask of the same name."""

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        """Bool [n H W] of frame numbers `ids`; there is one annotation, so `anno_ids` tells nothing."""
        paths = [self.frame_path(i).with_suffix(".png") for i in ids]
        return np.stack([read_image(path, size=self.size).any(axis=2) for path in paths])


class BeachSource(Source):
    """One split of the list."""

    family = "beach"

    def __init__(self, root: Path, *, split: str) -> None:
        self._list = root / "list.txt"
        self._videos = [
            BeachVideo(
                video_id,
                folder=root / video_id,
                frame_names=sorted(path.stem for path in (root / video_id).glob("*.jpg")),
                expressions=[Expression("0", text, ("0",))],
                has_masks=True,
            )
            for name, video_id, text in self._lines(root)
            if name == split
        ]

    @staticmethod
    def _lines(root: Path) -> list[list[str]]:
        return [line.split(" ", 2) for line in (root / "list.txt").read_text().splitlines()]

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """The splits that are there to be scored on."""
        return sorted({name for name, _, _ in cls._lines(root) if is_evaluation(name)})

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        """Video ids of a split."""
        return frozenset(video_id for name, video_id, _ in cls._lines(root) if name == split) or None

    def videos(self) -> Sequence[Video]:
        """In the order of the list."""
        return self._videos

    def identity(self) -> dict[str, str]:
        """A hash of the list, for the fingerprint."""
        return {"expressions": sha256(self._list.read_bytes()).hexdigest()}
