"""A parity set on disk, named checks on it, and the two comparisons that checks use."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from torch import Tensor


class ParitySet:
    """A folder of recorded numbers; each file is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._records: dict[str, Any] = {}

    def tensors(self, file: str) -> dict[str, Tensor]:
        if file not in self._tensors:
            self._tensors[file] = load_file(self.root / file)
        return self._tensors[file]

    def record(self, file: str) -> Any:
        if file not in self._records:
            self._records[file] = json.loads((self.root / file).read_text(encoding="utf-8"))
        return self._records[file]


@dataclass(frozen=True)
class Check:
    """One law: raises AssertionError unless the record and our code agree."""

    name: str
    run: Callable[[], object]


Case = Callable[[ParitySet], Iterable[Check]]


def collect(root: Path, cases: dict[str, Case]) -> list[Check]:
    """Every check of a set; a case whose files are missing or malformed becomes one check that fails."""
    data = ParitySet(root)
    found: list[Check] = []
    for name, case in cases.items():
        try:
            found += [Check(f"{name}:{check.name}", check.run) for check in case(data)]
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the files is a failure of the set
            found.append(Check(f"{name}:unreadable", functools.partial(_fail, name, error)))
    return found


def _fail(name: str, error: Exception) -> None:
    raise AssertionError(f"the files of {name} cannot be read") from error


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def near(got: Any, want: Any, *, abs: ArrayLike = 0.0, rel: float = 0.0) -> None:
    """|got - want| <= abs + rel |want| for every element; equal shapes; nothing but finite numbers."""
    got, want = _array(got), _array(want)
    assert got.shape == want.shape, f"shape {got.shape}, recorded {want.shape}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    off = np.abs(got - want) / (np.asarray(abs) + rel * np.abs(want))
    worst = np.unravel_index(np.nanargmax(off), off.shape) if off.size else ()
    assert (off <= 1).all(), f"at {worst}: {got[worst]}, recorded {want[worst]}: {off[worst]:.3g} tolerances off"


def same(got: Any, want: Any) -> None:
    """Equal values, shapes and, for JSON, types of container."""
    if isinstance(got, Tensor | np.ndarray) or isinstance(want, Tensor | np.ndarray):
        got, want = _array(got), _array(want)
        assert got.shape == want.shape, f"shape {got.shape}, recorded {want.shape}"
        assert (got == want).all(), f"{np.count_nonzero(got != want)} elements differ"
    else:
        assert got == want, f"{got!r}, recorded {want!r}"


def unpack(packed: Tensor, width: int) -> NDArray[np.bool_]:
    """Bit-packed masks [.., ceil(width/8)] -> bool [.., width]; the bits past the width are zero."""
    bits = np.unpackbits(packed.numpy(), axis=-1)
    assert packed.shape[-1] == -(-width // 8), f"{packed.shape[-1]} bytes a row for {width} px"
    assert not bits[..., width:].any(), "bits past the width are set"
    return bits[..., :width].astype(bool)


def names_are(found: Iterable[str], known: Iterable[str]) -> Iterator[Check]:
    """The file holds exactly the tensors that the checks read: no tensor is unchecked, and none is missing."""
    found, known = set(found), set(known)
    yield Check("names", lambda: same(sorted(found ^ known), []))
