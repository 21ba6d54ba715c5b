"""Shared by the tests of whole runs: a tiny Wan, a cache of a few clips, configs and the rows of a run."""

import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from forks import start_fork
from planted import planted
from safetensors.torch import load_file
from workers import be_rank

from flowmask.models.errors import UserError
from flowmask.trainer.config import RunConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "parity" / "e2e" / "data"
CLIP = {"short_side": 32, "long_side": 64, "size_multiple": 16, "crop_probability": 0.0}  # crops need larger videos
DIT = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 1, "freq_dim": 16}


def write_small_wan(folder: Path) -> None:
    """The tiny Wan with an even smaller DiT."""
    from flowmask.models.weights import tiny_wan

    normal = dict(tiny_wan.TRANSFORMER)
    tiny_wan.TRANSFORMER.update(DIT)
    try:
        tiny_wan.write_tiny_wan(folder)
    finally:
        tiny_wan.TRANSFORMER.update(normal)


def make_lab(folder: Path) -> None:
    """`folder/wan` and `folder/cache`: 16 examples of two shapes, 8 in each of two views."""
    from flowmask.data_pipeline.build.build import build
    from flowmask.data_pipeline.config import CacheBuildConfig

    write_small_wan(folder / "wan")
    build(CacheBuildConfig.model_validate(cache_settings(folder)))


def cache_settings(folder: Path) -> dict[str, Any]:
    """The config of the lab's cache."""
    return {
        "out": folder / "cache",
        "model": {"wan": folder / "wan"},
        "data": {"source": "mevis", "root": GOLDEN, "split": "valid_u"},
        "clip": {**CLIP, "frames": 5, "flip_probability": 0.5},
        "cache": {"clips_per_shard": 4, "views": 2, "leaks": "allow"},  # training on an evaluation split
    }


def broken_cache(lab: Path, folder: Path, *, examples: list[int]) -> Path:
    """The lab's cache with a NaN in the video's latents of some examples."""
    shutil.copytree(lab / "cache", folder)
    index = np.load(folder / "index.npy")
    names = [shard["file"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]]
    for row in index[examples]:
        with (folder / "shards" / names[int(row["shard"])]).open("r+b") as file:
            file.seek(int(row["video_mean"]))
            file.write(b"\xc0\x7f")  # a bfloat16 NaN
    return folder


def run_config(lab: Path, out: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A run of 10 steps on the lab's cache; `overrides` by dotted key."""
    tree: dict[str, Any] = {
        "out": str(out),
        "model": {"wan": str(lab / "wan")},
        "data": {"cache": str(lab / "cache")},
        "train": {"steps": 10, "lr": 2e-3, "global_batch": 4, "micro_batch": 2, "log_every_steps": 5},
        "checkpoint": {"every_steps": 3},
        "ema": {"decay": 0.9},
        "tracking": {"enabled": False},
    }
    for key, value in (overrides or {}).items():
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return RunConfig.model_validate(tree)


def start(lab: Path, out: Path, overrides: Mapping[str, Any] | None = None) -> int:
    """Run (or resume) in this process; the exit code."""
    from flowmask.trainer.run.train import run

    config = run_config(lab, out, overrides)
    return run(config)


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path, *, skipped: Sequence[int] = ()) -> list[float]:
    """A run's losses. The rows must be steps 1, 2, 3, ... once each; exactly the steps `skipped` are skipped."""
    found = rows(out)
    assert [row["step"] for row in found if row.get("skipped")] == [*skipped]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return [row["loss"] for row in found]


def unequal_tensors(one: Path, other: Path) -> list[str]:
    """The tensors that differ between the newest checkpoints of two runs: masters, moments, averages of all ranks.

    The process's own generator is left out: no code draws from it, and its state depends on the number of starts.
    """
    wrong, files = [], sorted((one / "checkpoints" / "latest").glob("rank_*.safetensors"))
    assert files, one
    for path in files:
        ours, theirs = load_file(path), load_file(other / "checkpoints" / "latest" / path.name)
        names = {name for name in ours.keys() | theirs.keys() if not name.startswith("rng|")}
        wrong += [
            name
            for name in sorted(names)
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        ]
    return wrong


def start_group(jobs: list[dict[str, Any]], *, folder: Path, ranks: int = 2) -> list[Any]:
    """Jobs one after another in one group of real processes.

    A job has lab, out and overrides. Optional: `code` (its exit code; 0), `raises` (the text of a UserError in every
    rank), `signal_rank` (the only rank that gets a SIGTERM) and `faults` (see planted.py). The output of the ranks is
    in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meet = Path(tempfile.mkdtemp(dir=folder)) / "meet"
    return [start_fork(_rank, rank, ranks, meet, jobs, folder / f"log_{rank}.txt") for rank in range(ranks)]


def run_group(jobs: list[dict[str, Any]], *, folder: Path, ranks: int = 2, timeout_s: float = 240) -> None:
    """`start_group`, then wait; a rank that fails or hangs fails the test with the printed output."""
    group = start_group(jobs, folder=folder, ranks=ranks)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and any(process.exitcode is None for process in group):
        if any(process.exitcode for process in group):
            break
        time.sleep(0.02)
    kill_group(group, only_alive=True)
    logs = "\n".join((folder / f"log_{rank}.txt").read_text()[-3000:] for rank in range(ranks))
    assert all(process.exitcode == 0 for process in group), logs


def kill_group(group: list[Any], *, only_alive: bool = False) -> None:
    """kill -9 every rank, and wait until the processes are gone."""
    for process in group:
        if process.exitcode is None or not only_alive:
            process.kill()
    for process in group:
        process.join()


def _rank(rank: int, ranks: int, meet: Path, jobs: list[dict[str, Any]], log: Path) -> None:
    be_rank(rank, ranks, meet=meet, log=log)
    for job in jobs:
        signalled = SignalAt.on_every_run() if job.get("signal_rank") == rank else nullcontext()
        raised = pytest.raises(UserError, match=job["raises"]) if "raises" in job else nullcontext()
        faults = planted([fault for fault in job.get("faults", ()) if fault.rank == rank])
        with signalled, raised, faults:
            assert start(Path(job["lab"]), Path(job["out"]), job["overrides"]) == job.get("code", 0)


class SignalAt:
    """An objective that acts as `inner`, and sends this process a signal in the loss of one step."""

    step: ClassVar[int] = 4

    def __init__(self, inner: Any) -> None:
        self.inner, self.needs = inner, inner.needs

    @classmethod
    @contextmanager
    def on_every_run(cls) -> Iterator[None]:
        """While inside, the objectives of this process's runs are wrapped."""
        from flowmask.trainer.run import train

        real = train.objective_named
        train.objective_named = lambda *args, **named: cls(real(*args, **named))  # type: ignore[assignment]
        try:
            yield
        finally:
            train.objective_named = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, module: Any, batch: Any) -> Any:
        if batch.step == self.step:
            signal.raise_signal(signal.SIGTERM)
        return self.inner.loss(module, batch)


class NanFrom(SignalAt):
    """An objective whose loss is NaN in some steps."""

    steps: ClassVar[range] = range(4, 7)

    def loss(self, module: Any, batch: Any) -> Any:
        loss, metrics = self.inner.loss(module, batch)
        return (loss * float("nan") if batch.step in self.steps else loss), metrics
