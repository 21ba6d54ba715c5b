"""The inputs, memory and outputs of a job are checked before it starts, as the job itself states them."""

from pathlib import Path
from typing import Any

import pytest
from runs import make_lab, run_config

from flowmask.launch.check import attention, preflight
from flowmask.launch.config import validate
from flowmask.launch.finding import Finding
from flowmask.launch.jobs import CacheJob, TrainJob
from flowmask.models.lora import add_lora
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.weights.wan import WanFolder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    return folder


def job(lab: Path, out: Path, **overrides: Any) -> TrainJob:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    return validate(run_config(lab, out, keys).model_dump(mode="json"), TrainJob, origin="a test")


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.mark.parametrize("trained", ["all", "lora", "decoder"])
def test_a_disk_too_small_for_the_checkpoints_of_what_is_trained_is_refused(
    trained: str, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan = WanFolder(lab / "wan")
    if trained == "decoder":
        the_job, module = job(lab, tmp_path, objective__kind="mask_decoder"), MaskDecoder.from_vae(wan.empty_vae())
    else:
        the_job, module = job(lab, tmp_path), wan.empty_transformer(video_injection=True)
    if trained == "lora":
        the_job = job(lab, tmp_path, lora={"rank": 2})
        assert the_job.lora is not None
        add_lora(module, the_job.lora, seed=0)
    numbers = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    needed = 16 * numbers * (the_job.checkpoint.keep_last + 1)
    for free, state in ((needed - 1, "fail"), (needed, "pass")):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place, free=free: type("Usage", (), {"free": free}))
        disk = found(preflight.examine(the_job))["disk"]
        assert disk.state == state and "checkpoint" in disk.said


def test_kernels_are_asked_for_on_the_machine_that_computes_and_not_known_before(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def yes(code: str) -> tuple[str, str]:
        asked.append(code)
        return "", ""

    monkeypatch.setattr(attention, "ask", yes)
    assert "attention" not in found(preflight.examine(job(lab, tmp_path)))
    flash = job(lab, tmp_path, train__attention="flash")
    there = found(preflight.examine(flash, script="#!/bin/sh"))["attention"]
    assert there.state == "unknown" and "srun" in there.fix and not asked
    assert found(preflight.examine(flash))["attention"].state == "pass" and len(asked) == 1


def test_a_cache_that_is_read_through_a_pipe_is_no_folder_that_must_be_there(lab: Path, tmp_path: Path) -> None:
    piped = job(lab, tmp_path, data__cache=f"pipe:cat {lab}/cache/{{}}", data__mode="stream")
    findings = preflight.examine(piped)
    preflight.refuse(findings)
    assert "data.cache" not in found(findings)
    mixed = job(lab, tmp_path, data={"mix": [{"cache": str(lab / "cache")}, {"cache": str(lab / "gone")}]})
    states = [finding.state for finding in preflight.examine(mixed) if finding.what == "data.cache"]
    assert states == ["pass", "fail"]


def test_a_missing_input_passes_only_where_a_job_before_makes_that_very_path(lab: Path, tmp_path: Path) -> None:
    tree = {"out": tmp_path / "a", "model": {"wan": lab / "wan"}, "data": {"root": lab}}
    before = validate(tree, CacheJob, origin="a test")
    for cache, state in ((tmp_path / "a", "pass"), (tmp_path / "a" / "b", "fail"), (tmp_path / "ab", "fail")):
        the_job = job(lab, tmp_path / "run", data__cache=str(cache))
        assert found(preflight.examine(the_job, expected=before.will_make))["data.cache"].state == state


def test_how_long_a_run_of_epochs_is_is_unknown_until_its_cache_is_there(lab: Path, tmp_path: Path) -> None:
    epochs = {"train__steps": None, "train__epochs": 2}
    there = job(lab, tmp_path / "run", **epochs)
    assert "steps" not in found(preflight.examine(there))
    later = job(lab, tmp_path / "run", data__cache=str(tmp_path / "later"), **epochs)
    findings = found(preflight.examine(later, expected=lambda path: path.parent == tmp_path / "later"))
    assert findings["steps"].state == "unknown" and "train.epochs is 2: the number of steps" in findings["steps"].said
    assert all(finding.state != "fail" for finding in findings.values())
    short = job(lab, tmp_path / "run", **epochs, train__global_batch=64)
    assert found(preflight.examine(short))["steps"].state == "fail"


@pytest.mark.parametrize(
    ("text", "expected"), [("2:00:00", 120), ("1-00:30:00", 1470), ("05:00", 5), ("UNLIMITED", None), ("", None)]
)
def test_slurms_times_are_read(text: str, expected: int | None) -> None:
    assert preflight.minutes(text) == expected
