"""A cache, a run and an evaluation of an earlier version (tests/golden/older) still open and continue."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import GOLDEN, rows

from flowmask.data_pipeline.check.verify import verify
from flowmask.launch.config import load_job
from flowmask.launch.curriculum.done import judge
from flowmask.launch.curriculum.stages import Stage
from flowmask.launch.jobs.cache import CacheJob
from flowmask.launch.jobs.evaluate import EvaluateJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.jobs.train import TrainJob
from flowmask.launch.watch.runs import look
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.show.overlay import read_mask
from flowmask.trainer.predict.weights import load_dit, load_mask_decoder
from flowmask.trainer.run.train import run
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig

OLDER = Path(__file__).parent / "golden" / "older"
EXPECTED: dict[str, Any] = json.loads((OLDER / "expected.json").read_text())
WAN_WRITTEN_NS = 10**18  # fixed, since a checkout sets new times and an evaluation stores those of its Wan folder
ROUNDING = 1e-5  # losses and norms of SSE4, AVX2 and AVX-512 kernels differ by 1e-7 at most


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as the working folder, since the files refer to each other by relative paths."""
    torch.set_num_threads(1)
    shutil.copytree(OLDER, tmp_path, symlinks=True, dirs_exist_ok=True)
    (tmp_path / "data").symlink_to(GOLDEN)
    for path in (tmp_path / "wan").rglob("*.*"):
        os.utime(path, ns=(WAN_WRITTEN_NS, WAN_WRITTEN_NS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(job: TrainJob) -> list[dict[str, Any]]:
    assert run(job) == 0
    return rows(job.out)


@pytest.mark.parametrize("name", ["run", "decoder"])
def test_a_run_of_an_earlier_version_goes_on_with_the_losses_it_had_there(older: Path, name: str) -> None:
    wanted = EXPECTED[name]
    job = load_job(Path(name, "config.yaml"), TrainJob, [f"train.steps={len(wanted)}"])
    found = train(job)
    assert [row["batch"] for row in found] == [row["batch"] for row in wanted]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in wanted], rel=ROUNDING), key


def test_a_cache_of_an_earlier_version_verifies_and_trains_as_it_did(older: Path) -> None:
    report = verify(Path("cache"), decode_masks=2)
    assert report.ok and report.examples == 16 and len(report.masks) == 2
    found = train(load_job(Path("run/config.yaml"), TrainJob, ["out=again"]))
    assert [row["loss"] for row in found] == pytest.approx(
        [row["loss"] for row in EXPECTED["run"][: len(found)]], rel=ROUNDING
    )


def test_the_weights_of_an_earlier_version_load_and_export_to_the_bit(older: Path) -> None:
    assert load_dit("run").sha256 == EXPECTED["weights"]["dit"]
    assert load_mask_decoder("decoder").sha256 == EXPECTED["weights"]["mask_decoder"]
    assert export("run", format="safetensors", out=Path("dit.safetensors")).sha256 == load_dit("run").sha256


def test_a_run_of_an_earlier_version_is_evaluated_as_it_was(older: Path) -> None:
    job = load_job(Path("evaluation/config.yaml"), EvaluateConfig, ["out=again"])
    scores = evaluate(job)
    before = json.loads(Path("evaluation/scores.json").read_text())
    assert scores is not None and scores.weights == before["weights"]
    assert scores.fingerprint == before["fingerprint"]
    assert "<th>Step<td>3<" in (job.out / "report.html").read_text()
    masks = sorted(path.relative_to("evaluation") for path in Path("evaluation").rglob("*.png"))
    pixels = [[read_mask(folder / mask) for mask in masks] for folder in (Path("evaluation"), job.out)]
    assert masks and 0.01 < np.mean(pixels[0]) < 0.99
    assert np.mean(np.not_equal(*pixels)) < 1e-3, "only pixels within rounding of the threshold may flip"
    assert scores.totals["jf"] == pytest.approx(before["jf"], abs=0.1)


@pytest.mark.parametrize(
    ("folder", "kind", "steps"),
    [("cache", CacheJob, 8), ("decoder", TrainJob, 2), ("run", TrainJob, 3), ("evaluation", EvaluateJob, 1)],
)
def test_what_an_earlier_version_finished_is_seen_and_not_done_twice(
    older: Path, folder: str, kind: type[Job], steps: int
) -> None:
    status = look(Path(folder))
    assert (status.state, status.step) == ("finished", steps)
    config = load_job(Path(folder, "config.yaml"), kind)
    stage = Stage("old", job=config, needs=(), carries={}, retries=None)
    judgement = judge(stage, unfinished=set(), memo=older / "memo")
    assert judgement.done, judgement.why
