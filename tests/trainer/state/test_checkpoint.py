"""A checkpoint is complete or absent; a resumed run equals the run that never stopped, at any world size."""

import errno
import itertools
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from scenarios import PRECISIONS, SAVED, STAGES, Training, assert_same_training, same
from seals import rewrite
from workers import run_ranks

from flowmask.models.errors import CheckpointError
from flowmask.models.files import sha256_of
from flowmask.trainer import distributed
from flowmask.trainer.config import CheckpointConfig
from flowmask.trainer.state import checkpoint_write
from flowmask.trainer.state.checkpoint import read_full, read_state, verify
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.state.steps import complete

SUPPORT = Path(__file__).parents[2] / "support"
per_engine = pytest.mark.parametrize(("precision", "stage"), list(itertools.product(PRECISIONS, STAGES)))


@pytest.fixture
def training(tmp_path: Path) -> Training:
    torch.set_num_threads(1)
    distributed.init()
    return Training(stage=0, precision="fp32", micro=4, folder=tmp_path / "checkpoints")


@per_engine
def test_a_resumed_run_equals_one_that_never_stopped_to_the_bit(
    two_ranks: list[dict[str, Any]], precision: str, stage: int
) -> None:
    row = two_ranks[0]["trajectories"][f"{precision}/{stage}/2"]
    assert row["restored_exact"], "masters, moments and EMA come back as they were"
    assert row["resumed"] == row["losses"][SAVED:]
    assert row["end_exact"]
    assert row["state"] == {"step": SAVED, "note": "x"}


MOVES = {  # precision, ZeRO stage of the two processes that saved, stage of the resume
    1: [(precision, stage, 1) for precision in PRECISIONS for stage in STAGES],
    4: [("bf16", 1, 3), ("fp32", 3, 0)],
}


@pytest.mark.parametrize("world_size", list(MOVES))
def test_a_run_of_two_processes_resumes_in_one_and_in_four_at_any_stage(
    two_ranks: list[dict[str, Any]], saved_by_two: Path, tmp_path: Path, world_size: int
) -> None:
    arguments = {"folder": str(saved_by_two), "moves": MOVES[world_size]}
    file = SUPPORT / "scenarios.py"
    found = run_ranks(world_size, file, "continued", folder=tmp_path, timeout_s=400, arguments=arguments)
    assert len(found[0]) == len(MOVES[world_size])
    for name, losses in found[0].items():
        precision, stage, _ = name.split("/")
        expected = two_ranks[0]["trajectories"][f"{precision}/{stage}/2"]["losses"][SAVED:]
        assert_same_training(losses, expected, precision=precision)


@per_engine
def test_whole_tensors_are_read_without_any_process_group(
    two_ranks: list[dict[str, Any]], saved_by_two: Path, precision: str, stage: int
) -> None:
    assert two_ranks
    folder = saved_by_two / f"{precision}_{stage}" / "latest"
    whole = {kind: read_full(folder, kind=kind) for kind in ("ema", "master")}
    names = list(read_state(folder)["parameters"])
    assert list(whole["ema"]) == names == list(whole["master"])
    alone = Training(stage=0, precision="fp32", folder=folder.parent)
    alone.restore()
    assert same(whole["ema"], alone.ema.full_state_dict())
    assert same(whole["master"], alone.engine.full_state_dict())


def test_the_last_k_stay_and_latest_points_to_the_newest(training: Training) -> None:
    for step in (1, 2, 3):
        training.save(step)
    folder = training.checkpoints.folder
    assert [path.name for path in complete(folder)] == ["step_00000003", "step_00000002"]
    assert (folder / "latest").readlink() == Path("step_00000003")
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002", "step_00000003"]


def _die_at(call_number: int) -> None:
    """kill -9 this process at its `call_number`-th file-system call from now on."""
    seen = 0

    def counted(real: Any, half: Any = None) -> Any:
        def touch(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call_number:
                if half is not None:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return touch

    def half_a_file(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half a file")

    checkpoint_write.save_file = counted(save_file, half_a_file)  # type: ignore[assignment]
    for name in ("open", "fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "scandir"):
        setattr(os, name, counted(getattr(os, name)))


def _killed_while(work: Any, *, call_number: int) -> bool:
    """Run `work` in a forked process that dies at a file-system call; False if `work` ended before."""
    child = os.fork()
    if child == 0:
        _die_at(call_number)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def test_kill_9_at_any_moment_of_a_save_and_its_deletions_leaves_the_last_complete_checkpoint(
    training: Training,
) -> None:
    folder = training.checkpoints.folder
    states = {}
    for step in (1, 2, 3):
        training.run(range(step, step + 1))
        states[step] = training.everything()
        if step < 3:
            training.save(step)
    keep = folder.with_name("keep")
    shutil.copytree(folder, keep, symlinks=True)
    steps_found = []
    for call_number in itertools.count(1):
        shutil.rmtree(folder)
        shutil.copytree(keep, folder, symlinks=True)
        if not _killed_while(lambda: training.save(3, best=True), call_number=call_number):
            break
        training.checkpoints.clean()
        names = {path.name for path in folder.iterdir()}
        assert all(name in ("latest", "best") or name.startswith("step_") for name in names), call_number
        newest = training.checkpoints.newest()
        assert newest is not None and verify(folder / "latest") is None, call_number
        steps_found.append(read_state(newest)["step"])
        assert same(read_full(newest, kind="master"), _masters(states[steps_found[-1]])), call_number
        assert training.warnings == []
    assert set(steps_found) == {2, 3} and steps_found == sorted(steps_found) and call_number > 20


def test_a_disk_that_is_full_at_any_moment_of_a_save_is_one_line_and_keeps_the_earlier_one(training: Training) -> None:
    training.save(1)
    for fails_at in itertools.count(1):
        calls = 0

        def full(path: Path, real: Any = checkpoint_write.sync, fails_at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(path)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint_write, "sync", full)
            try:
                training.save(2)
                break
            except CheckpointError as refused:
                assert "No space left on device" in str(refused) and "\n" not in str(refused)
        newest = training.checkpoints.newest()
        assert newest is not None and read_state(newest)["step"] in (1, 2)
        assert not list(training.checkpoints.folder.glob(".writing_*"))
    assert fails_at > 4 and training.restore()["step"] == 2


class Gate:
    """Holds back every write until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()

        def held_back(tensors: Any, path: Path) -> None:
            assert self._open.wait(60)
            save_file(tensors, path)

        monkeypatch.setattr(checkpoint_write, "save_file", held_back)

    def open(self) -> None:
        self._open.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_leak_into_it(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    training.run(range(1))
    before = training.everything()
    training.begin(1)
    training.run(range(1, 4))
    assert training.checkpoints.busy and training.checkpoints.newest() is None
    assert training.checkpoints.covers(1) and not training.checkpoints.covers(3)
    gate.open()
    training.checkpoints.settle()
    assert not training.checkpoints.busy and training.checkpoints.saved_step == 1
    assert not same(before, training.everything())
    training.restore()
    assert same(before, training.everything())


def test_a_second_save_waits_for_the_first_and_both_are_whole(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    states = {}
    for step in (1, 2):
        training.run(range(step, step + 1))
        states[step] = training.everything()
        if step == 2:
            threading.Timer(0.2, gate.open).start()
        training.begin(step)
    training.checkpoints.settle()
    for path in complete(training.checkpoints.folder):
        assert same(read_full(path, kind="master"), _masters(states[read_state(path)["step"]]))
    assert training.checkpoints.saved_step == 2 and len(complete(training.checkpoints.folder)) == 2


def test_a_save_that_the_disk_refuses_costs_a_warning_and_the_next_one_tries_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training.save(1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_write, "save_file", full)
        training.begin(2)
        training.checkpoints.settle()
        assert "step 2 could not be written: [Errno 28] No space left" in training.warnings.pop()
        assert training.checkpoints.saved_step == 1 and not training.checkpoints.covers(2)
        with pytest.raises(CheckpointError, match=r"of step 2: \[Errno 28\] No space left .* earlier checkpoints"):
            training.save(2)
    training.save(3)
    assert [path.name for path in complete(training.checkpoints.folder)] == ["step_00000003", "step_00000001"]


def test_milestones_and_the_best_stay_for_ever(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    kept = CheckpointConfig(keep_last=1, milestone_every_steps=4)
    training = Training(stage=0, precision="fp32", micro=4, folder=tmp_path / "checkpoints", kept=kept)
    for step in range(1, 11):
        training.save(step, best=step in (2, 3))
    folder = training.checkpoints.folder
    assert [read_state(path)["step"] for path in complete(folder)] == [10, 8, 4, 3]
    assert (folder / "best").resolve().name == "step_00000003"
    training.checkpoints.mark_best()
    assert (folder / "best").resolve().name == "step_00000010"


def _masters(everything: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix("master|"): v for k, v in everything.items() if k.startswith("master|")}


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(training: Training, damage: str) -> None:
    for step in (1, 2):
        training.save(step)
    newest = training.checkpoints.folder / "step_00000002"
    file = newest / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        (newest / "state.json").write_text((newest / "state.json").read_text()[:100])
    assert training.restore()["step"] == 1
    assert len(training.warnings) == 1
    assert "step_00000002" in training.warnings[0] and "using the previous" in training.warnings[0]


def test_when_every_checkpoint_is_damaged_nothing_starts_anew_behind_ones_back(training: Training) -> None:
    assert training.checkpoints.newest() is None
    file = training.save(1) / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        training.checkpoints.newest()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(training: Training) -> None:
    file = training.save(1) / "rank_00000.safetensors"
    file.unlink()
    training.save(1)
    assert training.restore()["step"] == 1 and training.warnings == []


def _rewrite(path: Path, change: Any) -> None:
    """Change the tensors of a checkpoint, and record the hash of the new file."""
    file = path / "rank_00000.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    facts = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    rewrite(path / "state.json", lambda document: document["files"].update({file.name: facts}))


@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq", "ema"])
def test_an_element_that_is_missing_or_stored_twice_is_an_error(training: Training, kind: str) -> None:
    path = training.save(1)
    key = f"proj_out.bias|{kind}|0"
    _rewrite(path, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(CheckpointError, match=f"lacks 1 elements of {kind} of proj_out.bias"):
        training.restore()
    path = training.save(1)
    _rewrite(path, lambda tensors: tensors.update({f"proj_out.bias|{kind}|1": tensors[key][:2].clone()}))
    with pytest.raises(CheckpointError, match=f"holds 2 elements twice of {kind} of proj_out.bias"):
        training.restore()


def test_a_checkpoint_of_another_model_is_refused_by_the_first_parameter_that_differs(training: Training) -> None:
    path = training.save(1)
    rewrite(path / "state.json", lambda document: document["parameters"].update({"proj_out.bias": [7]}))
    with pytest.raises(CheckpointError, match=r"another model: proj_out.bias has shape \[7\] there"):
        training.restore()


def test_what_a_killed_process_left_is_cleaned_and_nothing_else(training: Training) -> None:
    training.save(1)
    folder = training.checkpoints.folder
    for name in (".writing_step_00000009_1", ".trash_step_00000008"):
        (folder / name).mkdir()
    (folder / ".link_latest").symlink_to("step_00000009")
    (folder / "notes.txt").write_text("mine")
    Checkpoints(folder, config=CheckpointConfig(), warn=print).clean()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "notes.txt", "step_00000001"]
