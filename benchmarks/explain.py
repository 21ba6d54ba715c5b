"""The cost of a run's time line: CPU time of stopwatch, written lines and watchdog, as a part of a step.

    python benchmarks/explain.py [--json]                           the calls of a step alone; a second, without torch
    python benchmarks/explain.py --run [--json] [--steps N] [--every N]

`--run`: a tiny DiT on a synthetic cache, in one process, without MLflow. Its steps are as short as possible, so the
part is the largest that a run can have. Times are CPU seconds of the training thread, which do not depend on other
work of the machine. Every call of the stopwatch and of the witness is timed; the cost of timing counts as theirs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from flowmask.trainer.explain.timeline import TimelineFile
from flowmask.trainer.phases import Phases, Spent

MICRO_BATCHES, COLLECTIVES, EVERY = 2, 3, 10  # in a step at ZeRO 1; steps per line


def bare(folder: Path, *, steps: int = 5000) -> dict[str, float]:
    """CPU microseconds of the calls of one step, with a line every EVERY steps."""
    phases, file = Phases(), TimelineFile(folder, rank=0, world_size=2)
    file.add(0, Spent(1, 1.0, {}))  # imports of the first line
    began = thread_time()
    for step in range(1, steps + 1):
        phases.enter("read")
        phases.copied(0.0)
        for _ in range(MICRO_BATCHES):
            phases.enter("forward")
            phases.enter("backward")
        phases.enter("optimizer")
        for _ in range(COLLECTIVES):
            with phases.waiting(phases.begin("all_reduce", [])):
                pass
        phases.enter("other")
        phases.end_lap()
        with phases.within("save"):
            pass
        if step % EVERY == 0:
            file.add(step, phases.take())
    spent = thread_time() - began
    file.close()
    return {"cost_us": 1e6 * spent / steps}


class Meter:
    """CPU seconds and calls of some functions; of nested calls only the outermost counts."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._inside = 0.0, 0, False

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            if self._inside:
                return call(*args, **named)
            self._inside, began = True, thread_time()
            try:
                return call(*args, **named)
            finally:
                self.seconds += thread_time() - began
                self.calls, self._inside = self.calls + 1, False

        return timed


def measure(folder: Path, *, steps: int, every: int) -> dict[str, float]:
    """CPU microseconds of the time line in a step, the step's milliseconds, and their ratio in percent."""
    from tracking import make_world

    from flowmask.trainer.config import RunConfig
    from flowmask.trainer.explain.witness import Witness
    from flowmask.trainer.run.run_state import Run
    from flowmask.trainer.run.train import run

    make_world(folder)
    timed = {Phases: ("enter", "end_lap", "take", "copied"), Witness: ("profile_asked", "agreed")}
    meter, begun = Meter(), list[tuple[float, float, int]]()
    for owner, names in timed.items():
        for name in names:
            setattr(owner, name, meter.timed(getattr(owner, name)))
    real = Run.next_batch

    def next_batch(one: Any) -> Any:
        begun.append((thread_time(), meter.seconds, meter.calls))
        return real(one)

    Run.next_batch = next_batch  # type: ignore[method-assign]
    tree = {
        "out": folder / "run",
        "model": {"wan": folder / "wan"},
        "data": {"cache": folder / "cache"},
        "train": {"steps": steps, "global_batch": 1, "log_every_steps": every},
        "checkpoint": {"every_steps": 10**6},
        "tracking": {"enabled": False},
    }
    assert run(RunConfig.model_validate(tree)) == 0
    warm = len(begun) // 4
    (first, spent, calls), (last, spent_then, calls_then) = begun[warm], begun[-1]
    turns = len(begun) - 1 - warm
    return {
        "steps": turns,
        "step_ms": 1e3 * (last - first) / turns,
        "calls": (calls_then - calls) / turns,
        "cost_us": 1e6 * (spent_then - spent) / turns,
        "cost_pct": 100 * (spent_then - spent) / (last - first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=EVERY)
    parser.add_argument("--run", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {"steps": asked.steps, "every": asked.every}
        found = measure(Path(folder), **ways) if asked.run else bare(Path(folder))
    if asked.json:
        print(json.dumps(found))
        return
    if not asked.run:
        print(f"the calls of a step take {found['cost_us']:.0f} us: 1 % of a step of {found['cost_us'] / 10:.1f} ms")
        return
    print(
        f"{found['calls']:.1f} calls a step take {found['cost_us']:.0f} us of {found['step_ms']:.1f} ms: "
        f"{found['cost_pct']:.2f} % (mean of {found['steps']:.0f} steps, a line every {asked.every})"
    )


if __name__ == "__main__":
    main()
