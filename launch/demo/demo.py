"""`flowmask demo`: every stage on synthetic videos; each stage is the same job as on real data.

A stopped demo continues when it is started again, because each of its jobs does. Refuses a folder with a demo
of other settings.
"""

import json
import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from flowmask.launch.config import load_job
from flowmask.launch.configs import BUNDLED
from flowmask.launch.demo.report import collect, refuse_skips, show
from flowmask.launch.demo.world import claim, write_dataset, write_wan
from flowmask.launch.dispatch import run
from flowmask.launch.jobs import KINDS
from flowmask.launch.progress import bar
from flowmask.models.errors import UserError
from flowmask.models.files import read_object, write_atomically
from flowmask.models.folders.output_folder import Kind, OutputFolder

MARK, REPORT = "demo.json", "report.json"
DEMO = Kind("a demo", older=lambda out: () if "profile" in read_object(out / MARK) else None)


class Profile(StrEnum):
    """How long the demo trains."""

    DEFAULT = "default"
    SMOKE = "smoke"
    FULL = "full"


def run_demo(out: Path, profile: Profile, *, console: Console) -> dict[str, Any]:
    """Run every stage into `out`, write `out/report.json` and print it as a table; returns the report."""
    settings = load_settings(profile)
    folder = OutputFolder(out, DEMO)
    with folder.held():
        claim(out / MARK, settings, what="a demo")
        return _all_stages(out, settings, console)


def _all_stages(out: Path, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    started = time.time()
    if (out / REPORT).is_file():
        report: dict[str, Any] = json.loads((out / REPORT).read_text())
        console.print(f"{out} holds this demo, finished")
        show(out, report, console)
        return report
    DemoRun(out, settings, console).run()
    report = collect(out) | {"wall_s": round(time.time() - started, 1)}
    write_atomically(out / REPORT, json.dumps(report, indent=2) + "\n")
    show(out, report, console)
    return report


def load_settings(profile: Profile) -> dict[str, Any]:
    """The sizes of a profile, and the overrides of its jobs, from configs/demo.yaml."""
    settings = yaml.safe_load(_config("demo.yaml").read_text())
    return {"profile": str(profile), **settings["dataset"], **settings["profiles"][profile]}


class DemoRun:
    """The stages in order; each is skipped if its result exists."""

    def __init__(self, out: Path, settings: dict[str, Any], console: Console) -> None:
        self.out, self.settings, self.console = out, settings, console
        self.machine = machine()

    def run(self) -> None:
        """dataset -> wan -> cache -> decoder -> DiT -> J&F -> prediction."""
        self._say("1/7", "synthetic dataset")
        write_dataset(self.out / "dataset", self.settings)
        self._say("2/7", "tiny Wan")
        write_wan(self.out / "wan", seed=self.settings["seed"])
        self._say("3/7", "latent cache")
        started = time.time()
        encoder = {"bf16": "bfloat16", "fp32": "float32"}[self.machine.convolutions]
        self._job("cache", "cache.yaml", self.out / "cache", f"cache.encoder_dtype={encoder}")
        self._note("cache_s", time.time() - started)
        self._say("4/7", "mask decoder")
        self._train("decoder", self.machine.convolutions)
        self._say("5/7", "DiT")
        self._train("dit", self.machine.attention)
        self._say("6/7", "J&F on held-out videos")
        self._job("evaluate", "evaluate.yaml", self.out / "evaluate", "precision=fp32")
        self._say("7/7", "prediction")
        self._predict()

    def _say(self, number: str, what: str) -> None:
        self.console.print(Text.assemble((number, "bold"), f" {what}"))

    def _note(self, key: str, value: float) -> None:
        """Save a duration with the demo's settings, unless an earlier start has saved it."""
        path = self.out / "durations.json"
        durations = json.loads(path.read_text()) if path.is_file() else {}
        write_atomically(path, json.dumps({key: round(value, 2)} | durations))

    def _predict(self) -> None:
        """Two sentences about different objects of a held-out video, given as an mp4."""
        from flowmask.trainer.predict.predict import predict

        video = self.out / "example.mp4"
        prompts = write_example(self.out / "dataset", video)
        with bar() as update:
            checkpoint = str(self.out / "runs" / "dit")
            predict(video, prompts, checkpoint=checkpoint, out=self.out / "predict", on_progress=update)

    def _train(self, name: str, precision: str) -> None:
        overrides = [f"{key}={value}" for key, value in self.settings[name].items()]
        tracking = f"tracking.uri=sqlite:///{self.out.resolve()}/mlflow.db"
        run = self.out / "runs" / name
        self._job("train", f"{name}.yaml", run, f"train.precision={precision}", tracking, *overrides)
        refuse_skips(run)

    def _job(self, kind: str, part: str, out: Path, *overrides: str) -> None:
        """Run one job of configs/demo with all paths below `out`."""
        places = {
            "cache": [f"data.root={self.out}/dataset", f"model.wan={self.out}/wan"],
            "train": [f"data.cache={self.out}/cache", f"model.wan={self.out}/wan"],
            "evaluate": [
                f"data.root={self.out}/dataset",
                f"calibrate.data.root={self.out}/dataset",
                f"checkpoint={self.out}/runs/dit",
            ],
        }[kind]
        if part == "dit.yaml":
            places.append(f"model.mask_decoder={self.out}/runs/decoder")
        settings = [f"out={out}", *places, *overrides]
        processes = load_job(_config(part), KINDS[kind], settings).most_processes(self.machine.processes)
        settings.append(f"launch.processes_per_node={processes}")
        if run(load_job(_config(part), KINDS[kind], settings)):
            raise UserError(f"the demo was asked to stop; the same command continues: flowmask demo --out {self.out}")


@dataclass(frozen=True)
class Machine:
    """Settings for this machine: one process per GPU, or two on CPU; precision by the speed of bfloat16."""

    processes: int
    convolutions: Literal["bf16", "fp32"]  # encoding and the mask decoder
    attention: Literal["bf16", "fp32"]  # the DiT: PyTorch's bf16 attention backward is slow on a CPU


def machine() -> Machine:
    """Choose the settings by the hardware's support of bfloat16."""
    import torch

    if torch.cuda.is_available():
        return Machine(torch.cuda.device_count(), "bf16", "bf16")
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Machine(min(2, len(os.sched_getaffinity(0))), "bf16" if fast else "fp32", "fp32")


def write_example(dataset: Path, path: Path) -> list[str]:
    """Write an mp4 of the first held-out video with sentences about different objects; returns two of them.

    path: an existing file is kept
    """
    from flowmask.data_pipeline.config import DataSourceConfig
    from flowmask.data_pipeline.sources import open_source
    from flowmask.trainer.predict.show.overlay import OverlayVideo

    for video in open_source(DataSourceConfig(root=dataset, split="valid_u")).videos():
        first = video.expressions[0]
        other = next((e for e in video.expressions if e.anno_ids and not set(e.anno_ids) & set(first.anno_ids)), None)
        if other is None:
            continue
        if not path.exists():
            frames = video.frames(range(len(video.frame_names)))
            height, width = frames[0].shape[:2]
            with OverlayVideo(path, prompts=[], height=height, width=width, fps=5) as writer:
                for frame in frames:
                    writer.add(frame, [])
        return [first.text, other.text]
    raise AssertionError("the synthetic dataset has no video with two objects")


def _config(part: str) -> Path:
    return BUNDLED / (part if part == "demo.yaml" else f"demo/{part}")
