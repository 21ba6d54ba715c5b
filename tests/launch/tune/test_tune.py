"""`flowmask tune` on a tiny Wan: it finds a planted slow setting, and the config that it writes trains the same."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from runs import GOLDEN, SignalAt, cache_settings, losses, unequal_tensors

from flowmask.launch.check import preflight
from flowmask.launch.cli import main as cli
from flowmask.launch.config import load_job
from flowmask.launch.jobs import CacheJob, TrainJob
from flowmask.launch.jobs.job import Job
from flowmask.launch.tune import sample, trials, tune
from flowmask.launch.tune.search import Changes, Timing
from flowmask.trainer.run.train import run

PLANTED_S = 0.25  # sleep in each pass of the slow settings: more than the noise of this machine


class Planted(SignalAt):
    """An objective that is slow under recomputation."""

    slow = False

    def recompute(self, module: Any, kind: str) -> None:
        self.inner.recompute(module, kind)
        self.slow = True

    def loss(self, module: Any, batch: Any) -> Any:
        time.sleep(PLANTED_S * self.slow)
        return self.inner.loss(module, batch)


class InThisProcess(trials.Trials):
    """Trials in the test's process, on a machine without a compiler: a few steps of the same job."""

    def __call__(self, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing:
        assert isinstance(job, TrainJob)
        if job.train.compile:
            return Timing(changes, said="failed: no compiler here")
        self._count += 1
        resolved = trials.trial_of(job, self._scratch / str(self._count))
        resolved["train"]["steps"] = 5
        timed = TrainJob.model_validate(resolved)
        assert run(timed) == 0
        return trials.timing_of(changes, trials.rows_of(timed.out.parent, job), trials.PACES["train"])


def command(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["flowmask", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def trained(config: Path, out: Path, **changes: object) -> list[float]:
    """The losses of a short run of a config."""
    words = [f"out={out}", "train.steps=3", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    assert run(load_job(config, TrainJob, words).for_room()) == 0
    return losses(out)


def test_a_planted_slow_setting_is_found_and_the_config_that_is_written_learns_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "Trials", InThisProcess)
    config, out = world / "train.yaml", tmp_path / "fast.yaml"
    with Planted.on_every_run():
        assert command("tune", config, "--minutes", 60, "--out", out, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "(fastest)" in said and "as given" in said and "no compiler here" in said
    before, after = yaml.safe_load(config.read_text()), yaml.safe_load(out.read_text())
    assert after["train"]["activation_checkpointing"] == "none"
    changed = {
        key for key in before["train"].keys() | after["train"] if before["train"].get(key) != after["train"].get(key)
    }
    assert changed <= {"activation_checkpointing", "micro_batch"} and before["data"]["cache"] == after["data"]["cache"]
    assert not (world / "run").exists(), "the run itself has not begun"
    given, found = trained(config, tmp_path / "given"), trained(out, tmp_path / "found")
    assert found == pytest.approx(given, rel=5e-3)
    reading = trained(config, tmp_path / "reading", data__threads=4, data__prefetch_batches=8)
    assert reading == given and not unequal_tensors(tmp_path / "given", tmp_path / "reading")


def test_a_run_that_has_begun_keeps_what_rounds_otherwise(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    trained(world / "train.yaml", out)
    seen: list[Changes] = []

    def note(self: object, job: Job, changes: Changes, **_: Any) -> Timing:
        seen.append(changes)
        return Timing(changes, 1.0 - len(seen) / 100)

    monkeypatch.setattr(trials.Trials, "__call__", note)
    words = ["tune", world / "train.yaml", "--minutes", 60, "train.steps=3"]
    assert command(*words, f"out={out}", monkeypatch=monkeypatch) == 0
    kept, seen[:] = list(seen), []
    assert command(*words, f"out={tmp_path / 'new'}", monkeypatch=monkeypatch) == 0
    assert any("train.compile" in changes for changes in seen)
    assert kept and not any("train.compile" in changes for changes in kept)


def test_the_decoding_threads_of_a_build_are_found(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk and a fast encoder: each additional thread makes the build faster."""
    real, known = sample.decode, {}

    def slow(clip: Any, video: Any, **named: Any) -> Any:
        time.sleep(0.05)
        if str(clip) not in known:
            known[str(clip)] = real(clip, video, **named)
        return known[str(clip)]

    monkeypatch.setattr(sample, "decode", slow)
    monkeypatch.setattr(sample.Build, "encoder", SimpleNamespace(encode=list))
    pace = trials.Pace(1, 3, 0.0)

    class Enough(Exception):  # noqa: N818 - ends the endless work
        pass

    def timed(self: trials.Trials, job: Job, changes: Changes, *, until: float, best: Timing) -> Timing:
        self._count += 1
        rows = self._scratch / f"{self._count}.jsonl"
        units = iter(range(1 + pace.warm_up + pace.rows))

        def some() -> int:
            if (unit := next(units, None)) is None:
                raise Enough
            return unit

        monkeypatch.setattr(sample, "count", lambda: iter(some, None))
        with pytest.raises(Enough):
            sample.keep_encoding(trials.trial_of(job, self._scratch), rows, worker=0)
        found = trials.timing_of(changes, trials.read_rows(rows), pace)
        assert not list(self._scratch.glob("run/*")), "nothing of it is stored"
        return found

    monkeypatch.setattr(trials.Trials, "__call__", timed)
    config = tmp_path / "cache.yaml"
    tree = cache_settings(world) | {"out": str(tmp_path / "cache")}
    tree["cache"] |= {"decode_threads": 1}
    config.write_text(yaml.safe_dump(CacheJob.model_validate(tree).model_dump(mode="json", exclude_unset=True)))
    out = tmp_path / "fast.yaml"
    assert command("tune", config, "--minutes", 60, "--out", out, monkeypatch=monkeypatch) == 0
    assert yaml.safe_load(out.read_text())["cache"]["decode_threads"] >= 4
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing.yaml"], "nothing.yaml"),
        (["train.yaml", "data.cache=elsewhere"], "it must be a cache that `flowmask cache build` finished"),
        (["train.yaml", "train.micro_batsh=2"], "did you mean train.micro_batch?"),
        (["train.yaml", "--minutes", "0"], "--minutes is 0; it must be above 0"),
        (["train.yaml", "--minutes", "nan"], "--minutes is nan; it must be above 0"),
        (["train.yaml", "--out", "train.yaml"], "--out train.yaml already exists; remove it, or name another file"),
        (["train.yaml", "--out", "train.yaml/fast.yaml"], "train.yaml is not writable: name another file"),
        (["evaluate.yaml"], "evaluate.yaml is an evaluation"),
        (["cache.yaml"], "data.root: nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_before_anything_is_timed(
    words: list[str],
    said: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trials.Trials, "__call__", lambda *args, **named: pytest.fail("a job was timed"))
    monkeypatch.setattr(preflight, "_deepspeed", lambda job: preflight.Finding("deepspeed", "pass", ""))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_bytes((world / "train.yaml").read_bytes())
    (tmp_path / "evaluate.yaml").write_text(f"out: scores\ncheckpoint: run\ndata: {{root: {GOLDEN}, split: valid_u}}\n")
    (tmp_path / "cache.yaml").write_text(f"out: cache\nmodel: {{wan: {world / 'wan'}}}\ndata: {{root: nowhere}}\n")
    before = sorted(tmp_path.iterdir())
    assert command("tune", *words, monkeypatch=monkeypatch) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flowmask: ")]
    assert len(lines) == 1 and said in lines[0] and sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_when_nothing_had_a_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = {"said": "the time was over"}
    monkeypatch.setattr(trials.Trials, "__call__", lambda self, job, changes, **_: Timing(changes, **timing))
    out = tmp_path / "fast.yaml"
    assert command("tune", world / "train.yaml", "--minutes", 0.001, "--out", out, monkeypatch=monkeypatch) == 2
    assert "--minutes 0.001; give more" in capsys.readouterr().err and not out.exists()
    timing.clear()
    monkeypatch.setattr(
        trials.Trials,
        "__call__",
        lambda self, job, changes, **_: Timing(changes, said="does not fit: it is full", no_room=True),
    )
    assert command("tune", world / "train.yaml", "--minutes", 60, "--out", out, monkeypatch=monkeypatch) == 2
    assert "fits this machine; `flowmask plan` shows the memory needs" in capsys.readouterr().err and not out.exists()


def test_a_time_is_the_median_behind_the_warm_up_and_clearly_slower_ones_are_not_waited_for() -> None:
    pace = trials.Pace(warm_up=2, rows=4, seconds=3.0)
    rows = [{"step_s": value, "data_wait_pct": 50} for value in (90, 80, 1, 2, 9, 2)]
    found = trials.timing_of({}, rows, pace)
    assert (found.unit_s, found.waits) == (2, 0.5)
    assert trials.enough(rows, pace, best=Timing({}))
    for before, slower in ((0.5, 0.5, 0.5), True), ((0.5, 0.5, 8.0), False), ((0.5, 0.5), False):
        assert trials.enough(rows[:5], pace, best=Timing({}, 1.0, before)) == slower, (
            "step by step: clips differ in size"
        )
    few = trials.timing_of({}, rows[:4], pace)
    assert few.unit_s is None and few.said
