"""Laws of the overlapped stages: order is kept, work is bounded, any error ends all stages and releases claims."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flowmask.data_pipeline.build.pipeline import UNITS_AT_ONCE, Pipeline, PipelineStages, UnitInHand

AHEAD = 3


class Trace:
    """A pipeline over numbers that records its work; `break_at`: the stage and item that fail."""

    def __init__(self, break_at: tuple[str, int] | None = None, before_encode: Callable[[int], None] | None = None):
        self.break_at, self.before_encode = break_at, before_encode or (lambda _: None)
        self.written: dict[int, list[int]] = {}
        self.held: set[int] = set()
        self.most_held = self.waiting = self.most_waiting = 0
        self.lock = threading.Lock()

    def run(self, units: int, *, size: int = 5, threads: int = 3) -> None:
        stages: PipelineStages[int, int, int] = PipelineStages(
            items=lambda unit: [100 * unit + i for i in range(size)],
            decode=self._decode,
            encode=self._encode,
            write=self._write,
        )
        Pipeline(stages, decode_threads=threads, ahead=AHEAD).run(self._claimed(units))

    def _claimed(self, units: int) -> Iterator[tuple[int, ExitStack]]:
        for unit in range(units):
            self._fail("claim", unit)
            stack = ExitStack()
            with self.lock:
                self.held.add(unit)
                self.most_held = max(self.most_held, len(self.held))
            stack.callback(self._let_go, unit)
            yield unit, stack

    def _let_go(self, unit: int) -> None:
        with self.lock:
            self.held.remove(unit)

    def _fail(self, stage: str, item: int) -> None:
        if (stage, item) == self.break_at:
            raise ValueError(f"{stage} {item}")

    def _decode(self, item: int) -> int:
        self._fail("decode", item)
        with self.lock:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        return item

    def _encode(self, unit: UnitInHand[int], decoded: Iterator[int]) -> Iterator[int]:
        for item in decoded:
            self.before_encode(item)
            with self.lock:
                self.waiting -= 1
            self._fail("encode", item)
            yield -item

    def _write(self, unit: UnitInHand[int], encoded: Iterator[int]) -> None:
        items = []
        for item in encoded:
            self._fail("write", -item)
            items.append(item)
        assert unit.number in self.held, "the claim was given back before its unit was written"
        self.written[unit.number] = items


def test_every_unit_is_written_in_the_order_of_its_items_and_its_claim_given_back():
    trace = Trace()
    trace.run(9)
    assert trace.written == {unit: [-(100 * unit + i) for i in range(5)] for unit in range(9)}
    assert trace.held == set()


def test_what_waits_for_the_encoder_and_what_is_claimed_is_bounded():
    trace = Trace()
    trace.run(20, size=2, threads=8)
    assert trace.most_held <= UNITS_AT_ONCE
    assert trace.most_waiting <= AHEAD + 1  # the encoder has taken one that still counts as waiting


def test_items_of_a_unit_are_decoded_while_the_one_before_is_encoded():
    """Item 100 belongs to unit 1. The encoder waits for its decoding while it holds the last item of unit 0."""
    decoded = threading.Event()
    trace = Trace(before_encode=lambda item: decoded.wait(30) if item == 4 else None)  # type: ignore[arg-type]
    inner = trace._decode
    trace._decode = lambda item: (decoded.set() if item == 100 else None, inner(item))[1]  # type: ignore[method-assign]
    trace.run(2)
    assert decoded.is_set() and len(trace.written) == 2


@pytest.mark.parametrize("stage", ["claim", "decode", "encode", "write"])
@pytest.mark.parametrize("item", [0, 3])
def test_an_error_of_any_stage_is_raised_and_every_claim_given_back(stage: str, item: int):
    item = item if stage == "claim" else 100 * item + 4
    trace = Trace(break_at=(stage, item))
    with pytest.raises(ValueError, match=f"{stage} {item}"):
        trace.run(6)
    assert trace.held == set()
    assert all(len(items) == 5 for items in trace.written.values())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_an_interrupt_ends_all_threads_and_gives_every_claim_back():
    def interrupt(item: int) -> Any:
        if item == 102:
            raise KeyboardInterrupt

    trace = Trace(before_encode=interrupt)
    with pytest.raises(KeyboardInterrupt):
        trace.run(6)
    assert trace.held == set()


def test_no_unit_at_all_is_no_error():
    Trace().run(0)
