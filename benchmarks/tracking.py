"""The cost of MLflow for a run: steps/s without tracking, with a healthy server, and with one that never answers.

    python benchmarks/tracking.py [--json] [--steps N] [--rounds N] [--folder DIR]

A tiny DiT on a synthetic cache, on this machine, each step is a point; medians over interleaved rounds. Rates cover the
second half of a run's steps, since the start of the sender process takes a few seconds of CPU time. `whole` has the
same ratios over all steps, with that cost. CPU seconds depend less on other work of the machine: `cpu` is the ratio of
steps per CPU second of the training process alone, `sender_cpu_s` the sender's CPU time in a whole run.
"""

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.sources.synthetic import write_synthetic
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.trainer.config import RunConfig
from flowmask.trainer.run.train import run

MODES = ("without", "healthy", "hanging")


def make_world(folder: Path) -> None:
    """A tiny Wan and a cache of 16 synthetic videos."""
    write_synthetic(folder / "dataset", split="train", videos=16, seed=0)
    write_tiny_wan(folder / "wan")
    tree = {
        "out": folder / "cache",
        "model": {"wan": folder / "wan"},
        "data": {"source": "mevis", "root": folder / "dataset", "split": "train"},
        "clip": {"sampling": "whole", "frames": 5, "short_side": 64, "long_side": 64, "augment": False},
    }
    build(CacheBuildConfig.model_validate(tree))


@contextmanager
def healthy(folder: Path) -> Iterator[str]:
    """A real `mlflow server`; its URI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 180
        while not answers(port):
            assert server.poll() is None and time.monotonic() < until, (folder / "server.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
        return True
    return False


@contextmanager
def hanging() -> Iterator[str]:
    """A socket that takes connections and never answers; its URI."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def rates(folder: Path, name: str, uri: str | None, *, steps: int) -> dict[str, float]:
    """For one run: steps/s of its second half and of all but the first five steps; CPU seconds."""
    tree: dict[str, Any] = {
        "out": folder / "runs" / name,
        "model": {"wan": folder / "wan", "text_tokens": 16},
        "data": {"cache": folder / "cache"},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 8, "log_every_steps": 1},
        "checkpoint": {"every_steps": 10 * steps},
        "tracking": {"enabled": uri is not None, "uri": uri, "end_timeout_s": 15 if name.startswith("healthy") else 1},
    }
    config = RunConfig.model_validate(tree)
    before, children = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run(config)
    cpu_s, after = time.process_time() - before, resource.getrusage(resource.RUSAGE_CHILDREN)
    sender_s = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]

    def since(first: int) -> float:
        return (len(times) - 1 - first) / (times[-1] - times[first])

    return {"half": since(steps // 2), "whole": since(5), "cpu": steps / cpu_s, "sender_cpu_s": sender_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON line")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="an empty folder to keep everything in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_world(folder)
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        with healthy(folder) as server, hanging() as silence:
            uris = {"without": None, "healthy": server, "hanging": silence}
            rates(folder, "warm", None, steps=20)
            for number in range(arguments.rounds):
                for mode in (*MODES[number % 3 :], *MODES[: number % 3]):
                    name = f"{mode}_{number}"
                    found[mode].append(rates(folder, name, uris[mode], steps=arguments.steps))
    report(found, as_json=arguments.json)


def report(found: dict[str, list[dict[str, float]]], *, as_json: bool) -> None:
    result: dict[str, Any] = {"rounds": len(found["without"])}
    for mode, runs in found.items():
        result[f"{mode}_steps_per_s"] = round(statistics.median(run["half"] for run in runs), 3)
    for kind, suffix in (("half", ""), ("whole", "_whole"), ("cpu", "_cpu")):
        for mode in MODES[1:]:
            ratios = [a[kind] / b[kind] for a, b in zip(found[mode], found["without"], strict=True)]
            result[f"{mode}_ratio{suffix}"] = round(statistics.median(ratios), 3)
    for mode in MODES[1:]:
        result[f"{mode}_sender_cpu_s"] = round(statistics.median(run["sender_cpu_s"] for run in found[mode]), 3)
    for key, value in result.items():
        print(f"{key:24} {value}")
    if as_json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
