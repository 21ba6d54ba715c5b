"""The training loop, and the signals that may end it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType

from flowmask.models import process
from flowmask.trainer.run.run_state import Run


class Ending(Enum):
    """Why the loop ended. The state is saved in every case."""

    FINISHED = "finished"
    STOPPED = "stopped by a signal"
    BROKEN = "too many steps in a row were not finite or out of bounds"
    EMPTY = "no step counted"


def train(run: Run) -> Ending:
    """Train until the last step, a signal or the guard; saves the state and returns the reason."""
    if run.validation_due():  # a signal had stopped the run just before it
        run.validate()
    while not (run.finished or run.stopping):
        batch = run.next_batch()
        result = run.take_step(batch)
        run.advance(result)
        run.agree()
        run.move_save_on()
        if run.stopping or run.broken:
            break
        if run.validation_due():
            run.validate()
        if run.save_due():
            run.save()
    run.save_and_wait()
    if run.finished:
        return Ending.EMPTY if run.empty else Ending.FINISHED
    return Ending.BROKEN if run.broken else Ending.STOPPED


@contextmanager
def stop_signals(raise_flag: Callable[[], None]) -> Iterator[None]:
    """Inside the block, stop signals only call `raise_flag`; clusters and launchers may send several."""
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in process.stop_signals()}

    def handle(number: int, frame: FrameType | None) -> None:
        raise_flag()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
