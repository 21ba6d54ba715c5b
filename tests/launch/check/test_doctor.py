"""`flowmask doctor`: every check has an answer of one line, and each fault comes with its fix."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import flowmask
from rich.console import Console

from flowmask.launch.check import questions
from flowmask.launch.check.doctor import as_json, examine, show
from flowmask.launch.check.questions import Subject, subject_of
from flowmask.launch.finding import Finding


def only(check: Callable[[Subject], list[Finding]], subject: Subject) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(subject, [check])}


def test_this_machine_passes_what_the_tests_themselves_need(tmp_path: Path) -> None:
    report = json.loads(flowmask("doctor", "--json").stdout)
    state = {line["check"]: line["state"] for line in report["checks"]}
    for check in ("python", "torch", "gloo", "deepspeed", "av", "mlflow", "atomic rename", "exclusive create"):
        assert state[check] == "pass"
    assert report["ok"]
    assert all(line["fix"] for line in report["checks"] if line["state"] != "pass")


def train_config(folder: Path, cache: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"out: {folder}/run\nmodel: {{wan: {folder}/wan}}\ndata: {{cache: {cache}, mode: stream}}\n"
        "train: {steps: 1, global_batch: 1}\n"
    )
    return path


def test_what_a_config_names_is_examined(tmp_path: Path) -> None:
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_tiny_wan(tmp_path / "wan")
    config = train_config(tmp_path, f"{tmp_path}/gone")
    findings = only(questions.inputs, subject_of(config))
    assert (findings["model.wan"].state, findings["data.cache"].state) == ("pass", "fail")
    piped = only(questions.inputs, subject_of(train_config(tmp_path, f"'pipe:cat {tmp_path}/gone/{{}}'")))
    assert "data.cache" not in piped  # no folder
    subject = subject_of(config, ["launch.cluster=slurm", "launch.partition=gpu", "tracking.uri=http://x:1"])
    assert (subject.cluster, subject.partition, subject.tracking_uri) == ("slurm", "gpu", "http://x:1")


def test_kernels_that_this_machine_lacks_are_a_line_with_a_fix_and_on_a_login_node_not_known(tmp_path: Path) -> None:
    config = train_config(tmp_path, str(tmp_path))
    asked = ["train.attention=cudnn"]
    here = only(questions.attention, subject_of(config, asked))["attention"]
    if not torch.cuda.is_available():
        assert here.state == "fail" and here.said.startswith("train.attention is cudnn, which needs a GPU")
        assert here.fix and "\n" not in here.said
    login = only(questions.attention, subject_of(config, [*asked, "launch.cluster=slurm"]))["attention"]
    assert login.state == "unknown" and login.fix
    with (tmp_path / "said.txt").open("w") as file:
        show([login], Console(file=file, width=200))
    assert "1 unknown" in (tmp_path / "said.txt").read_text()
    assert not only(questions.attention, subject_of(config))


def test_several_datasets_are_each_looked_for(tmp_path: Path) -> None:
    config = tmp_path / "cache.yaml"
    sources = f"[{{source: mevis, root: {tmp_path}}}, {{source: videos, root: {tmp_path}/b}}]"
    config.write_text(f"out: c\nmodel: {{wan: {tmp_path}/wan}}\ndata: {sources}\n")
    found = [f.state for f in examine(subject_of(config), [questions.inputs]) if f.what == "data.root"]
    assert found == ["pass", "fail"]


def test_a_config_of_no_job_is_one_failed_line_and_the_machine_is_examined_all_the_same(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"out: {tmp_path}/run\ntrain: {{stepz: 1}}\n")
    found = {finding.what: finding for finding in examine(subject_of(config), [questions.inputs, questions.python])}
    assert found["config"].state == "fail" and "key model is missing" in found["config"].said
    assert found["python"].state == "pass"


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_tiny_wan(tmp_path / "wan")
    (tmp_path / "wan" / "transformer" / "config.json").write_text("{")
    finding = only(questions.inputs, subject_of(train_config(tmp_path, str(tmp_path))))["model.wan"]
    assert finding.state == "fail" and "transformer/config.json" in finding.said


def test_a_library_that_cannot_be_imported_is_a_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("av", "decord"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libavcodec.so.58: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(questions, "_LIBRARIES", {k: questions._LIBRARIES[k] for k in ("av", "decord", "submitit")})
    found = only(questions.libraries, Subject(tmp_path))
    assert found["av"].state == "fail" and "libavcodec.so.58" in found["av"].said
    assert found["decord"].state == "warn", "every video is read without it"
    assert found["submitit"].state == "pass"


def test_a_server_that_is_away_or_silent_is_a_warning_since_training_goes_on(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        asked = only(questions.mlflow_server, Subject(tmp_path, tracking_uri=f"http://127.0.0.1:{port}"))
    refused = only(questions.mlflow_server, Subject(tmp_path, tracking_uri=f"http://127.0.0.1:{port}"))
    assert {asked["mlflow server"].state, refused["mlflow server"].state} == {"warn"}


def test_slurm_that_is_not_here_fails_only_those_who_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    states = {
        cluster: only(questions.slurm, Subject(tmp_path, cluster=cluster))["slurm"].state
        for cluster in ("local", "slurm")
    }
    assert states == {"local": "warn", "slurm": "fail"}


def test_a_partition_that_does_not_exist_is_told_with_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'main* up 2 infinite idle'\necho 'high up 2 infinite idle'\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = only(questions.slurm, Subject(tmp_path, cluster="slurm", partition="gpu"))
    assert found["partition"].state == "fail" and "high, main" in found["partition"].fix


def test_a_place_where_nothing_can_be_written_fails() -> None:
    found = only(questions.filesystem, Subject(Path("/proc/flowmask/run")))
    assert found["writable"].state == "fail"


def test_a_clock_that_is_hours_off_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    now = time.time()
    monkeypatch.setattr(questions.time, "time", lambda: now + 7200)
    assert only(questions.filesystem, Subject(tmp_path))["clock"].state == "warn"


def test_a_check_that_breaks_is_a_failed_check_and_the_others_are_asked(tmp_path: Path) -> None:
    def broken(subject: Subject) -> list[Finding]:
        raise RuntimeError("two\nlines")

    findings = examine(Subject(tmp_path), [broken, questions.python])
    assert [finding.state for finding in findings] == ["fail", "pass"]
    assert not as_json(findings)["ok"] and "\n" not in findings[0].said
    show(findings, Console(file=sys.stderr))
