"""The filesystem calls of shared units: a fixed number for each unit and each worker, however many others there are."""

import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowmask.data_pipeline.claim import claims
from flowmask.data_pipeline.claim.claims import SharedUnits, claimed

ROOT = Path(__file__).parents[3]


def shared_units(folder: Path, units: Sequence[int]) -> SharedUnits:
    def listed() -> set[int]:
        with os.scandir(folder / "results") as entries:
            return {int(entry.name) for entry in entries}

    return SharedUnits(
        units,
        folder=folder / "claims",
        kind="unit",
        done=lambda unit: (folder / "results" / str(unit)).exists(),
        listed=listed,
        results=folder / "results",
    )


def played(folder: Path, *, workers: int, units: int, seed: int, patch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each unit was given. Workers take random turns; when one waits, another finishes its unit."""
    (folder / "results").mkdir(parents=True)
    draw = random.Random(seed)
    hands: dict[int, tuple[int, ExitStack]] = {}
    given: Counter[int] = Counter()

    def finish(worker: int) -> None:
        unit, held = hands.pop(worker)
        (folder / "results" / str(unit)).touch()
        held.close()

    def sleep(_: float) -> None:
        finish(draw.choice(sorted(hands)))

    patch.setattr(claims, "time", SimpleNamespace(sleep=sleep, monotonic=claims.time.monotonic))
    patch.setattr(claims, "_random", draw)
    starts = [units * worker // workers for worker in range(workers)]
    waiting = {
        worker: claimed(shared_units(folder, [*range(start, units), *range(start)]))
        for worker, start in enumerate(starts)
    }
    while waiting:
        worker = draw.choice(sorted(waiting))
        if worker in hands:
            finish(worker)
        if found := next(waiting[worker], None):
            hands[worker] = found
            given[found[0]] += 1
        else:
            del waiting[worker]
    return given


@pytest.mark.parametrize(
    ("workers", "units"), [(1, 64), (1, 512), (8, 512), (64, 512), pytest.param(200, 4000, marks=pytest.mark.long)]
)
def test_a_unit_and_a_worker_cost_as_much_whatever_the_number_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, units: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from questions import Questions, asked_of

    with monkeypatch.context() as patch, Questions() as asked:
        given = played(tmp_path, workers=workers, units=units, seed=0, patch=patch)
    assert given == dict.fromkeys(range(units), 1)
    assert asked_of(asked.passes["start"]) < 12 * units + 300 * workers
