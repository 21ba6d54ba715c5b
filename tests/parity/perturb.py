"""A copy of a parity set with one expected number off by ten times its tolerance; the tests must notice it.

Tolerances of tensors come from the set's README, not from the checks, so the two can disagree.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

# Tolerance of the numbers of each JSON file, by path; the first match holds. None: an input. 0: exact.
RECORDS: dict[str, list[tuple[str, float | None]]] = {
    "flow_loss/meta.json": [
        (r"loss\.", 1e-4),
        (r"grad_norm_before_clip\.", 5e-4),
        (r"ema_decay", 1e-9),
        (r"negative_controls_step0\.", 1e-4),
        (r"timesteps\.", 0),
        (r"", None),
    ],
    "timesteps/stats.json": [
        (r"\w+\.fraction_at_1000", 0.015),
        (r"\w+\.histogram_of_rest\.fractions", 0.012),
        (r"\w+\.rest_(mean|std)", 3.0),
        (r"\w+\.fraction_of_rest", 5e-4),
        (r"", 0),
    ],
    "sampler/schedules.json": [(r".*timesteps\.", 1e-3), (r".*sigmas\.", 1e-6), (r"", 0)],
    "text/captions.json": [(r"\d+\.raw", None), (r"", 0)],
    "metrics/expected.json": [(r"\w+\.[JF]", 1e-12), (r"\w+\.width", None), (r"", 0)],
    "resize/table.json": [(r"\d+\.orig", None), (r"", 0)],
    "frame_sampling/examples.json": [(r"\d+\.result", 0), (r"", None)],
    "frame_sampling/properties.json": [(r"fraction_with", 0.05), (r"", 0)],
    "frame_sampling/enumeration.json": [(r"tiny_annotation", None), (r"", 0)],
    "e2e/expected.json": [(r".*\.total", 0), (r".*\.(J|F)", 2e-3), (r".*near_threshold", 1e-3), (r"", 0)],
    "dit_plain/param_order.json": [(r"", 0)],
    "dit_dvi/param_order.json": [(r"", 0)],
}


@dataclass(frozen=True)
class Target:
    """One expected tensor, or the expected numbers of one JSON file under one key."""

    file: str
    name: str
    tolerance: str = ""

    @property
    def case(self) -> str:
        return self.file.split("/")[0]


def tensor_targets(root: Path) -> Iterator[Target]:
    """Every tensor with a tolerance in the set's README."""
    file = ""
    for line in (root / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"### `(.+\.safetensors)`", line):
            file = heading[1]
        row = re.fullmatch(r"\| `([^`]+)` \|.*\| ([^|]+) \|", line)
        if row and row[2] != "input":
            yield Target(file, row[1], row[2])


def record_targets(root: Path) -> Iterator[Target]:
    """Every top-level entry of the JSON files that holds an expected number or name."""
    for file in RECORDS:
        record = json.loads((root / file).read_text(encoding="utf-8"))
        names = {path.split(".")[0] for path, _ in _expected_leaves(file, record)}
        yield from (Target(file, name) for name in sorted(names))


def perturbed(root: Path, target: Target, to: Path, rng: random.Random) -> str:
    """Write the copy to `to` (links, except the one file); return the change, for messages."""
    shutil.copytree(root, to, copy_function=os.symlink)
    (to / target.file).unlink()
    if target.file.endswith(".json"):
        return _perturb_record(root, target, to, rng)
    tensors = load_file(root / target.file)
    place = _perturb_tensor(tensors[target.name], target.tolerance, rng)
    save_file(tensors, to / target.file)
    return f"{target.file}: {target.name}{place}"


def _perturb_tensor(tensor: NDArray[Any], tolerance: str, rng: random.Random) -> tuple[int, ...]:
    place = tuple(rng.randrange(side) for side in tensor.shape)
    old = tensor[place]
    if tolerance.startswith("exact"):
        if tensor.dtype == np.uint8:  # packed masks; the last byte of a row may hold padding
            place = (*place[:-1], rng.randrange(tensor.shape[-1] - 1))
            tensor[place] ^= 0xFF
        elif tensor.dtype.kind in "iu":
            tensor[place] = -old if tensor.min() < 0 else old + 1
        else:
            tensor[place] = old + max(1e-6, 1e-6 * abs(old))
        return place
    absolute = re.search(r"abs ([\d.e-]+)", tolerance)
    relative = re.search(r"rel ([\d.e-]+)", tolerance)
    scale = np.abs(tensor).max() if "of its max abs" in tolerance else abs(old)
    off = (float(absolute[1]) if absolute else 0) + (float(relative[1]) * scale if relative else 0)
    tensor[place] = old + rng.choice((-10, 10)) * off
    return place


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{i}" if path else str(i))
    else:
        yield path, value


def _expected_leaves(file: str, record: Any) -> Iterator[tuple[str, float]]:
    for path, _ in _leaves(record):
        tolerance = next(tol for pattern, tol in RECORDS[file] if re.match(pattern, path))
        if tolerance is not None:
            yield path, tolerance


def _perturb_record(root: Path, target: Target, to: Path, rng: random.Random) -> str:
    record = json.loads((root / target.file).read_text(encoding="utf-8"))
    leaves = [leaf for leaf in _expected_leaves(target.file, record) if leaf[0].split(".")[0] == target.name]
    path, tolerance = rng.choice(leaves)
    _change(record, path.split("."), lambda old: _off(old, tolerance, rng))
    (to / target.file).write_text(json.dumps(record), encoding="utf-8")
    return f"{target.file}: {path}"


def _off(old: Any, tolerance: float, rng: random.Random) -> Any:
    if isinstance(old, bool):
        return not old
    if old is None:
        return 1
    if isinstance(old, str):
        return f"{old}x"
    return old + (10 * tolerance or 1) * rng.choice((-1, 1))


def _change(value: Any, keys: list[str], change: Callable[[Any], Any]) -> None:
    """Replace the leaf at a path. A key can contain dots; its parts are joined again."""
    if isinstance(value, list):
        head, rest = int(keys[0]), keys[1:]
    else:
        size = next(n for n in range(1, len(keys) + 1) if ".".join(keys[:n]) in value)
        head, rest = ".".join(keys[:size]), keys[size:]
    if rest:
        _change(value[head], rest, change)
    else:
        value[head] = change(value[head])
