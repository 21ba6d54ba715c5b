"""The masks of one prompt as COCO's run-length code: a JSON list with one {frame, size, counts} per frame."""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats.rle import encode


class RunLengthFile:
    """Masks are appended one by one; `with` ends the list."""

    def __init__(self, path: Path) -> None:
        self._file, self._comma = path.open("w", encoding="utf-8"), "[\n"

    def add(self, frame: str, mask: NDArray[np.bool_]) -> None:
        """Append the mask bool [H W] of the frame of that name."""
        said = json.dumps({"frame": frame, **encode(mask)}, ensure_ascii=False)
        self._file.write(f"{self._comma}{said}")
        self._comma = ",\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.write("\n]\n")
        self._file.close()
