"""Everything that is measured, in the order of what it is worth: a row is not begun if it would not end in time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from gpu import forwards, jobs, steps
from gpu.lab import Lab
from gpu.scale import Scale
from gpu.steps import Way

FIRST_S = 240  # within which the first rows are measured
_COMPILE_S = 60.0  # of an estimate; as all of them, a guess until a GPU was measured


@dataclass(frozen=True)
class Row:
    """measure: figures by name, with units; first: step time beside memory and its plan, and a pass of each model."""

    kind: str
    of: str
    estimate_s: float
    measure: Callable[[Lab], dict[str, Any]] = field(compare=False)
    first: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.of}"


def all_rows(scale: Scale) -> list[Row]:
    """Every row once, the first ones first."""
    ways, compiled = list(_ways(scale)), Way(compile=True)
    return [
        Row("machine", "here", 2, forwards.machine, first=True),
        Row("matrix", "bf16", 4, partial(forwards.matrix, "bf16"), first=True),
        _step(Way(), first=True),
        *_forwards("bf16", first=True),
        Row("waits", str(Way()), 25, partial(steps.waits, Way())),
        *(_step(way) for way in ways if way.changes == 1),
        *(Row("cache", f"bf16, {n} at once", 15, partial(jobs.cache, "bf16", n)) for n in (1, 4)),
        *(Row("evaluate", f"{n} of a video", 20, partial(jobs.evaluate, n, "fp32")) for n in (1, 8)),
        *(Row("waits", str(way), 85, partial(steps.waits, way)) for way in ways if way == compiled),
        *(Row("start", f"{n} ranks", 20 + n, partial(jobs.start, n)) for n in scale.ranks),
        *_forwards("tf32"),
        Row("evaluate", "8 of a video, decoder in bf16", 20, partial(jobs.evaluate, 8, "bf16")),
        Row("cache", "tf32, 1 at once", 20, partial(jobs.cache, "tf32", 1)),
        *(_step(way) for way in ways if way.changes == 2),
        *_forwards("fp32"),
        *(Row("matrix", precision, 4, partial(forwards.matrix, precision)) for precision in ("tf32", "fp32")),
        *(_step(way) for way in ways if way.changes > 2),
    ]


def _ways(scale: Scale) -> Iterator[Way]:
    """Each way to train that is tried; precisions change alone."""
    for compile_, attention, micro_batch, recompute in product(
        scale.compiled, scale.attentions, scale.micro_batches, ("none", "selective", "full")
    ):
        yield Way(micro_batch=micro_batch, recompute=recompute, compile=compile_, attention=attention)
    yield from (Way(precision=precision) for precision in ("tf32", "fp32"))


def _step(way: Way, *, first: bool = False) -> Row:
    slow = 20 if way.precision == "fp32" else 0
    estimate = 20 + 6 * way.micro_batch + _COMPILE_S * way.compile + slow
    return Row("step", str(way), estimate, partial(steps.step, way), first=first)


def _forwards(precision: str, *, first: bool = False) -> Iterator[Row]:
    for name in forwards.MODELS:
        yield Row("forward", f"{name} {precision}", 15, partial(forwards.model, name, precision), first=first)
