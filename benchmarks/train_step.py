"""The cost of a training step beside its arithmetic: four ways to take it, in interleaved blocks of one process.

    python benchmarks/train_step.py [--json] [--rounds N] [--steps N]
    python benchmarks/train_step.py --device cuda --preset wan1.3b --batch 1 2 4 --table docs/benchmarks.md

trainer: the run itself, with loader, EMA, metrics, log and MLflow's sender. bare: only its DeepSpeed engine and
optimizer, on fixed tensors. bare_torch: plain PyTorch, bf16 weights, fp32 masters, fused AdamW. on_the_fly: the
trainer with VAE and UMT5 in the step, as in the reference. Medians of blocks; peak memory is the trainer's, measured
before the other ways are built. --table: the trainer at each batch size, with and without checkpointing.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from train_sizes import SIZES, TEXT_TOKENS, Encoders, Size
from train_ways import Bare, BareTorch, Trainer, inside_a_run

from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.run.run_state import Run
from flowmask.trainer.track.meters import peak_tflops

KINDS = ("none", "selective", "full")
WAYS = ("bare", "bare_torch", "trainer", "on_the_fly")
_MARKS = ("<!-- train_step: begin -->", "<!-- train_step: end -->")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Peak:
    """Peak memory since its creation, in GiB: allocated on the GPU, or resident on the host."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def gib(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def in_blocks(steps: dict[str, Callable[[], None]], *, rounds: int, length: int) -> dict[str, Any]:
    """Wall and CPU seconds of a step, medians over interleaved blocks in rotating order."""
    names = list(steps)
    wall: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            synchronise()
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(length):
                steps[name]()
            synchronise()
            wall[name].append((time.perf_counter() - started) / length)
            busy[name].append((time.process_time() - cpu) / length)
    return {name: (statistics.median(wall[name]), statistics.median(busy[name])) for name in names}


def measure(run: Run, size: Size, *, ways: Sequence[str], rounds: int, length: int) -> dict[str, Any]:
    """Examples/s of each way, the ratios, and the trainer's peak memory."""
    peak, train = Peak(), Trainer(run).step
    for _ in range(2):  # buffers, threads, compilation
        train()
    synchronise()
    found: dict[str, Any] = {"peak_memory_gib": round(peak.gib(), 3)}
    batch = run.config.train.micro_batch
    steps: dict[str, Callable[[], None]] = {}
    for way in ways:
        if way == "on_the_fly":
            encoders = Encoders(size, batch=batch, device=distributed.device())
            found["encoder_parameters_m"] = encoders.parameters_m
            steps[way] = Trainer(run, encoders).step
        elif way == "trainer":
            steps[way] = train
        else:
            steps[way] = (Bare if way == "bare" else BareTorch)(run, size).step
        steps[way]()
    seconds = in_blocks(steps, rounds=rounds, length=length)
    found |= {way: round(batch / wall, 4) for way, (wall, _) in seconds.items()}
    found["cpu_s_an_example"] = {way: round(cpu / batch, 3) for way, (_, cpu) in seconds.items()}
    for a, b in (("trainer", "bare"), ("bare", "bare_torch"), ("on_the_fly", "trainer")):
        if a in seconds and b in seconds:
            found[f"{a}_to_{b}"] = round(seconds[b][0] / seconds[a][0], 4)
    return found


def run_once(
    folder: Path, size: Size, *, batch: int, checkpointing: Any, options: argparse.Namespace, ways: Sequence[str]
) -> dict[str, Any]:
    """One training run whose loop is `measure`; all other parts are those of `flowmask train`."""
    config = RunConfig.model_validate(
        {
            "out": folder / f"run_{batch}_{checkpointing}",
            "model": {"wan": folder, "text_tokens": TEXT_TOKENS},
            "data": {"cache": folder / "cache"},
            "train": {
                "steps": 1_000_000,
                "lr": 1e-5,
                "global_batch": batch,
                "micro_batch": batch,
                "activation_checkpointing": checkpointing,
                "compile": options.compile,
                "attention": options.attention,
                "log_every_steps": 5,
            },
            "checkpoint": {"every_steps": 1_000_000},
            "tracking": {"enabled": not options.no_mlflow, "end_timeout_s": 0},
        }
    )
    found: dict[str, Any] = {}

    def loop(run: Run) -> None:
        found.update(measure(run, size, ways=ways, rounds=options.rounds, length=options.steps))

    inside_a_run(config, loop, build=lambda self: size.build_dit())
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = options.peak_tflops or peak_tflops(name)
        found["device"] = name
        found["mfu"] = round(found["trainer"] * size.step_flop / (peak * 1e12), 4) if peak else None
    return found


def table(rows: Sequence[dict[str, Any]], *, command: str, size: str) -> str:
    """Markdown of the trainer at each batch size and kind of checkpointing."""
    day = datetime.now(UTC).date().isoformat()
    device = rows[0].get("device", f"CPU, {torch.get_num_threads()} threads")
    lines = [f"{day}, {size}, {device}, torch {torch.__version__}:", "", f"    {command}", ""]
    lines += ["| batch | checkpointing | examples/s | MFU | peak memory, GiB |", "|---|---|---|---|---|"]
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") else "–"
        numbers = f"{row['trainer']:.3f} | {mfu} | {row['peak_memory_gib']:.2f}" if "trainer" in row else row["error"]
        lines.append(f"| {row['batch']} | {row['checkpointing']} | {numbers} |")
    return "\n".join(lines)


def write_between_marks(path: Path, text: str) -> None:
    """Replace the text between the marks in a Markdown file; missing marks are added at its end."""
    before = path.read_text() if path.exists() else ""
    if _MARKS[0] not in before:
        before += f"\n{_MARKS[0]}\n{_MARKS[1]}\n"
    head, rest = before.split(_MARKS[0], 1)
    path.write_text(f"{head}{_MARKS[0]}\n{text}\n{_MARKS[1]}{rest.split(_MARKS[1], 1)[1]}")


def sweep(folder: Path, size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The trainer alone at every batch size with each kind of checkpointing; out of memory is a row too."""
    rows = []
    for batch in options.batch:
        for checkpointing in options.checkpointing:
            row: dict[str, Any] = {"batch": batch, "checkpointing": checkpointing}
            try:
                row |= run_once(
                    folder, size, batch=batch, checkpointing=checkpointing, options=options, ways=["trainer"]
                )
            except torch.OutOfMemoryError:
                row["error"] = "out of memory | – | –"
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(row, file=sys.stderr)
            rows.append(row)
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(SIZES), default="cpu50m")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved blocks of each way")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="micro-batches; the ways at the first")
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        choices=("none", "selective", "full"),
        default=["none", "selective", "full"],
        help="of the table; the ways take the first",
    )
    parser.add_argument("--compile", action="store_true", help="train.compile")
    parser.add_argument("--attention", choices=("native", "cudnn", "flash"), default="native", help="train.attention")
    parser.add_argument("--table", type=Path, help="Markdown file to write the table into")
    parser.add_argument("--peak-tflops", type=float, help="of a GPU that the trainer does not know")
    parser.add_argument("--no-mlflow", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write; a folder of its own is made there")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: there is no GPU here; leave it out for the CPU")
    size = SIZES[options.preset]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size.write_cache(folder / "cache")
        first = options.checkpointing[0]
        found = {"preset": options.preset, "tokens": size.tokens, "step_tflop": round(size.step_flop / 1e12, 3)}
        if options.ways:
            found |= run_once(
                folder, size, batch=options.batch[0], checkpointing=first, options=options, ways=options.ways
            )
        if options.table is not None:
            found["table"] = sweep(folder, size, options)
            command = " ".join(["python", *sys.argv])
            write_between_marks(options.table, table(found["table"], command=command, size=options.preset))
    for key, value in found.items():
        print(f"{key:22} {value}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
