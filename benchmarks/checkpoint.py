"""The cost of checkpoints for the training: step times without a save, during a save, and a save that is waited for.

    python benchmarks/checkpoint.py --parameters-m 50 --steps 12 --json

One process with the trainer's own engine, EMA and checkpoints, on fixed tensors. `stall_s` is the delay of the step in
which a save begins (the host copies). The next steps share the machine with the writing thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowmask.trainer import distributed
from flowmask.trainer.config import CheckpointConfig
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine
from flowmask.trainer.train_config import TrainConfig

_SAID = """\
step alone {alone_s:.3f} s, with a save in flight {in_flight_s:.3f} s (worst {worst_s:.3f} s)
a save holds its step up for {stall_s:.3f} s = {stall_in_steps:.2f} steps
{gib:.2f} GiB on the disk {write_s:.2f} s later, beside the training; waited for: {waited_for_s:.2f} s"""


@dataclass
class Fixed:
    """A micro-batch that never changes."""

    x: Tensor
    digest: int = 0


class Square:
    """A loss that uses every layer."""

    def loss(self, module: nn.Module, batch: Fixed) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = next(module.parameters()).dtype
        return module(batch.x.to(dtype)).float().square().mean(), {}


def model(parameters: float) -> nn.Module:
    """Square layers of width 1024 with about this number of parameters."""
    layers = max(1, round(parameters / (1024 * 1024)))
    return nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(layers)))


def timed(call: Any) -> float:
    """Seconds of `call`, with the GPU's work."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(parameters: float, *, tokens: int, steps: int, rounds: int, folder: Path) -> dict[str, float]:
    """Medians over `rounds` of blocks of `steps` steps: alone, then with a save in flight."""
    train = TrainConfig(steps=1000, global_batch=1, lr=1e-5, precision="bf16" if _gpu() else "fp32")
    engine = Engine(model(parameters), train=train)
    ema = ShardedEma(engine, decay=0.999)
    problems: list[str] = []
    saves = Checkpoints(folder, config=CheckpointConfig(keep_last=1), warn=problems.append)
    batch = Fixed(torch.randn(1, tokens, 1024, device=distributed.device()))

    def step() -> None:
        engine.step(Square(), [batch])
        ema.update()
        if not distributed.sum_each(False, saves.busy)[1]:
            saves.advance()

    figures: dict[str, list[float]] = {key: [] for key in ("alone", "stall", "in_flight", "worst", "write")}
    for _ in range(2):
        step()
    for number in range(1, rounds + 2):
        alone = [timed(step) for _ in range(steps)]
        begun = time.perf_counter()
        state: dict[str, Any] = {}
        stall = timed(lambda n=number, s=state: saves.begin(engine, ema, step=n, state=s))
        during = []
        while saves.saved_step != number:
            during.append(timed(step))
        wrote = time.perf_counter() - begun
        if number == 1:
            continue  # the first save also allocates the host buffers
        for key, value in zip(
            figures, (statistics.median(alone), stall, statistics.median(during), max(during), wrote)
        ):
            figures[key].append(value)

    def save() -> None:
        saves.begin(engine, ema, step=999, state={})
        saves.require(999)

    waited_for = timed(save)
    assert not problems, problems
    size = sum(f.stat().st_size for f in (folder / "step_00000999").iterdir())
    found = {f"{key}_s": statistics.median(values) for key, values in figures.items()}
    found |= {"waited_for_s": waited_for, "gib": size / 2**30}
    found["stall_in_steps"] = found["stall_s"] / found["alone_s"]
    engine.close()
    return found


def _gpu() -> bool:
    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters-m", type=float, default=50, help="million parameters")
    parser.add_argument("--tokens", type=int, default=1024, help="rows that go through the layers in one step")
    parser.add_argument("--steps", type=int, default=6, help="steps of a block without a save")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a folder of its own is made there")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    distributed.init()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(
            options.parameters_m * 1e6,
            tokens=options.tokens,
            steps=options.steps,
            rounds=options.rounds,
            folder=Path(folder),
        )
    print(_SAID.format(**found))
    if options.json:
        print(json.dumps({key: round(value, 5) for key, value in found.items()}))


if __name__ == "__main__":
    main()
