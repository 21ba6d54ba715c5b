"""All measurements, most valuable first; a row does not begin if it could not end in time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from gpu import forwards, jobs, steps
from gpu.lab import Lab
from gpu.scale import Precision, Scale
from gpu.steps import Way

FIRST_S = 240  # time for the first rows
_COMPILE_S = 60.0  # in an estimate; all estimates are guesses until a GPU was measured


@dataclass(frozen=True)
class Row:
    """measure: figures by name, with units; first: one of the first rows, which must fit into FIRST_S."""

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
    first, *others = scale.precisions
    return [
        Row("machine", "here", 2, forwards.machine, first=True),
        _matrix(first, first=True),
        _step(Way(), first=True),
        *_forwards(first, first=True),
        Row("waits", str(Way()), 25, partial(steps.waits, Way())),
        *(_step(way) for way in ways if way.changes == 1),
        *(_cache(first, at_once) for at_once in (1, 4)),
        *(_encoder(way, first) for way in forwards.ENCODER_WAYS),
        *(_evaluate(sentences, "fp32") for sentences in (1, 8)),
        *(Row("waits", str(way), 85, partial(steps.waits, way)) for way in ways if way == compiled),
        *(Row("start", f"ranks: {n}", 20 + n, partial(jobs.start, n)) for n in scale.ranks),
        *(row for precision in others for row in (*_forwards(precision), _matrix(precision), _cache(precision, 4))),
        *(_evaluate(8, "bf16") for _ in others[:1]),
        *(_step(way) for way in ways if way.changes > 1),
    ]


def _ways(scale: Scale) -> Iterator[Way]:
    """Each way to train: fewest changes first; other precisions last."""
    names = ("recompute", "micro_batch", "attention", "compile")
    grid = product(scale.recomputes, scale.micro_batches, scale.attentions, scale.compiled)
    yield from sorted((Way(**dict(zip(names, values, strict=True))) for values in grid), key=lambda way: way.changes)
    yield from (Way(precision=precision) for precision in scale.precisions[1:])


def _step(way: Way, *, first: bool = False) -> Row:
    slow = 20 if way.precision == "fp32" else 0
    estimate = 20 + 6 * way.micro_batch + _COMPILE_S * way.compile + slow
    return Row("step", str(way), estimate, partial(steps.step, way), first=first)


def _forwards(precision: Precision, *, first: bool = False) -> Iterator[Row]:
    for name in forwards.MODELS:
        yield Row("forward", f"{name}, {precision}", 15, partial(forwards.model, name, precision), first=first)


def _matrix(precision: Precision, *, first: bool = False) -> Row:
    return Row("matrix", precision, 4, partial(forwards.matrix, precision), first=first)


def _encoder(way: str, precision: Precision) -> Row:
    estimate = 20 + _COMPILE_S * (way == "compiled")
    return Row("encoder", f"{way}, {precision}", estimate, partial(forwards.encoder, way, precision))


def _cache(precision: Precision, at_once: int) -> Row:
    return Row("cache", f"{precision}, clips at once: {at_once}", 20, partial(jobs.cache, precision, at_once))


def _evaluate(sentences: int, decoder: Precision) -> Row:
    of = f"sentences: {sentences}, decoder in {decoder}"
    return Row("evaluate", of, 20, partial(jobs.evaluate, sentences, decoder))
