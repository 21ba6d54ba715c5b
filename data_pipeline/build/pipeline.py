"""The overlapped stages of one worker: units are decoded, encoded and written at the same time.

    feeder thread: claims units and hands their clips to decoding threads, a bounded number ahead
    calling thread: encodes clips in their order, so batches are fixed by the unit
    writing thread: turns encoded clips into files, then gives the claim back

The first error of any thread stops all threads and is raised to the caller; no file is left incomplete.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")  # a part of a unit
Decoded = TypeVar("Decoded")
Encoded = TypeVar("Encoded")

UNITS_AT_ONCE = 3  # one decoded ahead, one encoded, one written
_ENCODED_AHEAD = 16  # clips that may wait for the writing thread


class _Stopped(Exception):  # noqa: N818 - no error: ends a thread after another one failed
    pass


class _Flow:
    """State shared by the threads: the first error, and one condition that wakes all threads."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    def stop(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Call with `changed` held; raises _Stopped once there is an error."""
        self.changed.wait_for(lambda: self.error is not None or ready())
        if self.error is not None:
            raise _Stopped


class _Queue(Generic[T]):
    """A bounded queue; both sides end when the flow is stopped."""

    def __init__(self, flow: _Flow, size: int):
        self._flow, self._size = flow, size
        self._items: deque[T] = deque()

    def put(self, item: T) -> None:
        with self._flow.changed:
            self._flow.wait(lambda: len(self._items) < self._size)
            self._items.append(item)
            self._flow.changed.notify_all()

    def get(self) -> T:
        with self._flow.changed:
            self._flow.wait(lambda: bool(self._items))
            item = self._items.popleft()
            self._flow.changed.notify_all()
        return item


def _until_none(queue: "_Queue[T | None]") -> Iterator[T]:
    while (item := queue.get()) is not None:
        yield item


@dataclass
class UnitInHand(Generic[Item]):
    """A unit from its claim to its last file."""

    number: int
    items: list[Item]
    claim: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True)
class PipelineStages(Generic[Item, Decoded, Encoded]):
    """The functions of the pipeline, each run in its own thread.

    items: the parts of a unit; encode: all parts of a unit to its results, in order, in the calling thread;
    write: results to files, which are complete when it returns.
    """

    items: Callable[[int], list[Item]]
    decode: Callable[[Item], Decoded]
    encode: Callable[[UnitInHand[Item], Iterator[Decoded]], Iterable[Encoded]]
    write: Callable[[UnitInHand[Item], Iterator[Encoded]], None]


class Pipeline(Generic[Item, Decoded, Encoded]):
    """One run over units; `ahead` bounds the decoded parts that wait for the encoder."""

    def __init__(self, stages: PipelineStages[Item, Decoded, Encoded], *, decode_threads: int, ahead: int):
        self._stages, self._flow = stages, _Flow()
        # Full while no further units may be claimed and no further parts decoded.
        self._units: _Queue[None] = _Queue(self._flow, UNITS_AT_ONCE)
        self._parts: _Queue[None] = _Queue(self._flow, ahead)
        self._in_hand: dict[int, UnitInHand[Item]] = {}
        self._decoding: _Queue[tuple[UnitInHand[Item], _Queue[Future[Decoded] | None]] | None] = _Queue(
            self._flow, UNITS_AT_ONCE
        )
        self._writing: _Queue[tuple[UnitInHand[Item], _Queue[Encoded | None]] | None] = _Queue(
            self._flow, UNITS_AT_ONCE
        )
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")

    def run(self, claimed: Iterator[tuple[int, ExitStack]]) -> None:
        """Work on every unit from `claimed`; returns when all units are written and their claims released."""
        feeder = threading.Thread(target=self._guarded, args=(self._feed, claimed), daemon=True)
        writer = threading.Thread(target=self._guarded, args=(self._write,))
        for thread in (feeder, writer):
            thread.start()
        try:
            self._encode()
        except _Stopped:
            pass
        except BaseException as error:
            self._flow.stop(error)
            raise
        finally:
            writer.join()
            self._pool.shutdown(wait=True, cancel_futures=True)
            # After an error, do not wait for the feeder: it may hang on another worker's claim.
            for unit in list(self._in_hand.values()):
                unit.claim.close()
        if self._flow.error is not None:
            raise self._flow.error

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
            self._flow.stop(error)

    def _feed(self, claimed: Iterator[tuple[int, ExitStack]]) -> None:
        while True:
            self._units.put(None)
            number, claim = next(claimed, (None, None))
            if number is None or claim is None:
                self._decoding.put(None)
                return
            unit: UnitInHand[Item] = UnitInHand(number, [], claim)
            self._keep(unit)
            unit.items = self._stages.items(number)
            decoded: _Queue[Future[Decoded] | None] = _Queue(self._flow, self._ahead + 1)
            self._decoding.put((unit, decoded))
            for item in unit.items:
                self._parts.put(None)
                decoded.put(self._pool.submit(self._stages.decode, item))
            decoded.put(None)

    def _keep(self, unit: UnitInHand[Item]) -> None:
        """From now on `run` releases the claim in every case."""
        with self._flow.changed:
            if self._flow.error is None:
                self._in_hand[unit.number] = unit
                return
        unit.claim.close()
        raise _Stopped

    def _encode(self) -> None:
        for unit, futures in _until_none(self._decoding):
            results: _Queue[Encoded | None] = _Queue(self._flow, _ENCODED_AHEAD)
            self._writing.put((unit, results))
            for encoded in self._stages.encode(unit, self._decoded(futures)):
                results.put(encoded)
            results.put(None)
        self._writing.put(None)

    def _decoded(self, futures: _Queue[Future[Decoded] | None]) -> Iterator[Decoded]:
        for future in _until_none(futures):
            decoded = future.result()
            self._parts.get()
            yield decoded

    def _write(self) -> None:
        for unit, results in _until_none(self._writing):
            self._stages.write(unit, _until_none(results))
            with self._flow.changed:
                del self._in_hand[unit.number]
            unit.claim.close()
            self._units.get()
