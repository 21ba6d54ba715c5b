"""A curriculum ends the same after any number of kills, runs no stage twice, and refuses impossible settings."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import Started, flowmask, start_flowmask
from curriculum_lab import curriculum, write, write_world
from fake_slurm import fake_slurm
from runs import unequal_tensors
from trials import SEED, TRIALS

from flowmask.launch.curriculum import curriculum as command
from flowmask.launch.curriculum import jobs as stage_jobs
from flowmask.launch.curriculum.checks import check
from flowmask.launch.curriculum.curriculum import run_curriculum
from flowmask.launch.curriculum.done import Judgement, judge_all
from flowmask.launch.curriculum.stages import Stage, load_curriculum
from flowmask.models.errors import ConfigError
from flowmask.trainer.state.checkpoint import read_state
from flowmask.trainer.state.steps import complete

PATIENCE_S = 900


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture
def tree(world: Path, tmp_path: Path) -> dict[str, Any]:
    return curriculum(world, tmp_path)


@pytest.fixture(scope="module")
def killed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The whole recipe, done: once its command was killed, once a rank of the decoder."""
    out = tmp_path_factory.mktemp("killed")
    tree = curriculum(world, out)
    stage(tree, "decoder")["config"]["train"] = {**stage(tree, "decoder")["config"]["train"], "steps": 12}
    stage(tree, "decoder")["retries"] = 1
    path = write(out / "curriculum.yaml", tree)
    os.environ["OMP_NUM_THREADS"] = "1"
    first = start_flowmask("curriculum", path)
    until(lambda: checkpoints(out / "decoder") >= 2, first)
    first.kill()
    first.wait()
    assert not (out / "pretrain").exists()
    saved = newest_step(out / "decoder")
    here = ("launch.cluster=debug", "stages.decoder.launch.cluster=local")  # fewer processes are faster
    second = start_flowmask("curriculum", path, *here)
    until(lambda: newest_step(out / "decoder") > saved, second)
    psutil.Process(second.pid).children()[0].send_signal(signal.SIGKILL)  # a rank
    said, _ = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0, said
    assert "starting again, 0 retries left" in said
    yield path, tree


def stage(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in tree["stages"] if one["name"] == name)


def checkpoints(out: Path) -> int:
    return len(complete(out / "checkpoints"))


def newest_step(out: Path) -> int:
    found = complete(out / "checkpoints")
    return int(read_state(found[0])["step"]) if found else 0


def until(condition: Callable[[], object], command: Started) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if command.poll() is not None or time.monotonic() > end:
            command.kill()
            pytest.fail(command.communicate()[0])
        time.sleep(0.05)


def judged(path: Path, *overrides: str) -> dict[str, Judgement]:
    loaded = load_curriculum(path, overrides)
    return judge_all(loaded, memo=loaded.out)


def undone(path: Path, *overrides: str) -> set[str]:
    return {name for name, found in judged(path, *overrides).items() if not found.done}


def test_a_killed_curriculum_carries_each_stage_into_the_next(killed: tuple[Path, dict[str, Any]]) -> None:
    path, _ = killed
    out = path.parent
    steps = {name: newest_step(out / name) for name in ("decoder", "pretrain", "finetune")}
    assert steps == {"decoder": 12, "pretrain": 4, "finetune": 4}
    from flowmask.trainer.predict.weights import load_dit, load_mask_decoder

    began = read_state(complete(out / "finetune" / "checkpoints")[0])["state"]["init"]
    assert began["sha256"] == load_dit(str(out / "pretrain"), ema=True).sha256
    assert began["sha256"] != load_dit(str(out / "pretrain"), ema=False).sha256
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    assert scores["jf"] is not None
    assert scores["weights"] == {
        "dit": load_dit(str(out / "finetune")).sha256,
        "mask_decoder": load_mask_decoder(str(out / "decoder")).sha256,
    }
    with zipfile.ZipFile(out / "submission" / "submission.zip") as archive:
        masks = out / "submission" / "masks"
        assert sorted(archive.namelist()) == sorted(str(p.relative_to(masks)) for p in masks.rglob("*.png"))
        assert archive.testzip() is None and archive.namelist()


def test_what_is_done_is_not_run_again(killed: tuple[Path, dict[str, Any]]) -> None:
    path, _ = killed
    out = path.parent
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and ".lock" not in p.name}
    done = flowmask("curriculum", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done, ") == 7
    changed = {p for p, time_ns in before.items() if p.stat().st_mtime_ns != time_ns}
    assert {p.name for p in changed} <= {"curriculum.json"}
    dry = flowmask("curriculum", path, "--dry-run").stdout
    assert dry.count(": skip (") == 7 and "model.init from pretrain" in dry


def test_done_is_told_by_content_and_nothing_of_another_content_is_overwritten(
    killed: tuple[Path, dict[str, Any]], world: Path, tmp_path: Path
) -> None:
    path, tree = killed
    out = path.parent
    assert undone(path) == set()
    assert undone(path, "stages.evaluate.sampler.steps=2") == {"evaluate"}
    assert undone(path, "stages.submission.archive=ref_youtube_vos") == {"submission"}
    assert undone(path, "stages.finetune.train.steps=6") == {"finetune", "evaluate", "submission"}
    with pytest.raises(ConfigError, match=r"stage finetune: .*finetune holds a run with another config: train.lr"):
        judged(path, "stages.finetune.train.lr=1")
    with pytest.raises(ConfigError, match=r"stage cache_mevis: .* holds a cache of another fingerprint"):
        judged(path, "stages.cache_mevis.cache.seed=3")
    with pytest.raises(ConfigError, match=r"stage finetune: .* started from weights of stage pretrain, which is not"):
        judged(path, "stages.pretrain.train.steps=6")
    other = copy.deepcopy(tree)
    for one in other["stages"]:
        one["config"]["out"] = str(tmp_path / one["name"])
    shutil.copytree(out / "decoder", tmp_path / "decoder", symlinks=True)
    elsewhere = write(tmp_path / "moved.yaml", {**other, "out": str(tmp_path / "curriculum")})
    assert judged(elsewhere)["decoder"].why == "cache_mevis not done"  # the cache is needed for the comparison
    shutil.copytree(out / "cache_mevis", tmp_path / "cache_mevis")
    assert judged(elsewhere)["decoder"].done


def test_other_weights_in_a_stages_folder_are_not_the_ones_it_was_built_on(
    killed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, _ = killed
    out = path.parent
    kept = tmp_path / "pretrain"
    (out / "pretrain").rename(kept)
    try:
        shutil.copytree(out / "finetune", out / "pretrain", symlinks=True)
        with pytest.raises(ConfigError, match=r"stage pretrain: .* another config"):
            judged(path)
        shutil.rmtree(out / "pretrain")
        shutil.copytree(kept, out / "pretrain", symlinks=True)
        shutil.rmtree(complete(out / "pretrain" / "checkpoints")[0])
        with pytest.raises(ConfigError, match=r"stage finetune: .* pretrain, which is not done"):
            judged(path)
        with pytest.raises(ConfigError, match=r"was started from weights \w{12}, but .* now has \w{12}"):
            judged(path, "stages.pretrain.train.steps=3")
    finally:
        shutil.rmtree(out / "pretrain", ignore_errors=True)
        kept.rename(out / "pretrain")
    assert undone(path) == set()


def refused(tree: dict[str, Any], tmp_path: Path, *overrides: str) -> str:
    path = write(tmp_path / "c.yaml", tree)
    with pytest.raises(ConfigError) as error:
        check(load_curriculum(path, overrides), done=set())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_a_curriculum_is_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    def changed(which: str, **keys: Any) -> str:
        other = copy.deepcopy(tree)
        stage(other, which).update(keys)
        return refused(other, tmp_path)

    assert "circle" in changed("cache_refcoco", needs=["finetune"])
    assert "needs nothing_known; stages are: cache_refcoco" in changed("decoder", needs=["nothing_known"])
    assert "stage decoder: kind is bake; it must be train, decoder, evaluate, cache" in changed("decoder", kind="bake")
    shared = str(tmp_path / "finetune")
    assert f"out is {shared} for finetune and for evaluate" in refused(tree, tmp_path, f"stages.evaluate.out={shared}")
    assert "two stages are called finetune" in changed("evaluate", name="finetune")
    assert "carries checkpoint from finetune, which it does not need" in changed("evaluate", needs=[])
    assert "set objective.kind=mask_decoder" in changed("decoder", overrides={})
    assert "put values from another stage under `carries`" in changed(
        "evaluate", overrides={"checkpoint": "${stages.finetune.out}"}
    )
    assert "stage finetune has no such key" in changed("evaluate", carries={"checkpoint": "${stages.finetune.folder}"})
    assert "unknown key train.stepz" in refused(tree, tmp_path, "stages.finetune.train.stepz=4")
    assert "train.global_batch is 3" in refused(tree, tmp_path, "stages.finetune.train.global_batch=3")
    assert "names no key of a stage" in refused(tree, tmp_path, "stages.nobody.train.steps=4")


def test_only_what_an_earlier_stage_will_make_may_be_missing(tree: dict[str, Any], tmp_path: Path) -> None:
    check(load_curriculum(write(tmp_path / "c.yaml", tree)), done=set())
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "sub"
    assert f"stage decoder: out is {below}; " in refused(tree, tmp_path, f"stages.decoder.out={below}")
    last, other = "checkpoints/step_00000004", "checkpoints/step_00000002"
    stage(tree, "finetune")["carries"]["model.init"] = f"${{stages.pretrain.out}}/{last}"
    check(load_curriculum(write(tmp_path / "c.yaml", tree)), done=set())
    stage(tree, "finetune")["carries"]["model.init"] = f"${{stages.pretrain.out}}/{other}"
    assert f"stage finetune: model.init: {tmp_path}/pretrain/{other} does not exist" in refused(tree, tmp_path)
    del stage(tree, "finetune")["carries"]["model.init"]
    gone = refused(tree, tmp_path, f"stages.finetune.model.init={tmp_path}/pretrain.old")
    assert f"model.init: {tmp_path}/pretrain.old does not exist" in gone


def test_weights_are_handed_on_only_with_equal_settings(tree: dict[str, Any], tmp_path: Path) -> None:
    said = refused(tree, tmp_path, "stages.cache_refcoco.cache.lowercase=false")
    assert "lowercase is False in pretrain and True in finetune" in said
    del stage(tree, "finetune")["carries"]["model.text_tokens"]
    for key, what in {
        "model.text_tokens=8": "text_tokens is 16 in pretrain and 8 in finetune",
        "model.mask_latent_norm=video": "mask_latent_norm is none in pretrain and video in finetune",
        "objective.video_injection=false": "video_injection is True in pretrain and False in finetune",
    }.items():
        assert what in refused(tree, tmp_path, f"stages.finetune.{key}")
    stage(tree, "finetune")["carries"]["model.init"] = "${stages.decoder.out}"
    assert "makes mask_decoder; it needs dit" in refused(tree, tmp_path)


def test_a_stage_that_would_train_on_cpus_unasked_is_refused_before_anything_is_submitted(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"main": [("(null)", 4)], "gpu": [("gpu:a100:8", 64)]})
    tree["launch"] = {"cluster": "slurm"}
    assert "stage decoder: partition main has no GPUs" in refused(tree, tmp_path)
    for launch, gpus in (({"partition": "gpu"}, "1 GPU (one per process)"), ({"gpus_per_node": 0}, "no GPUs")):
        tree["launch"] = {"cluster": "slurm", **launch}
        run_curriculum(load_curriculum(write(tmp_path / "c.yaml", tree)), wait=False, dry_run=True)
        said = capsys.readouterr().out
        assert said.count("each node: ") == len(tree["stages"]) and f"each node: {gpus}" in said


def test_a_stage_whose_job_ends_while_the_others_are_judged_is_not_submitted_again(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, sent = load_curriculum(write(tmp_path / "c.yaml", tree)), dict[str, list[str]]()
    first, *others = (one.name for one in loaded.stages)

    def submit(out: Path, stage: Stage, *, after: list[str]) -> str:
        sent[stage.name] = after
        return stage.name

    monkeypatch.setattr(stage_jobs, "submit", submit)
    monkeypatch.setattr(command, "judge", lambda stage, **_: Judgement(stage.name == first, "now"))
    command._submit_all(loaded, {name: Judgement(False, "earlier") for name in (first, *others)})
    assert list(sent) == others and all(first not in after for after in sent.values())


def test_a_curriculum_that_is_done_says_so_on_slurm_too(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path, monkeypatch, {"main": [("(null)", 4)]})
    tree["launch"] = {"cluster": "slurm", "gpus_per_node": 0}
    loaded = load_curriculum(write(tmp_path / "c.yaml", tree))
    monkeypatch.setattr(command, "judge_all", lambda *_, **__: {s.name: Judgement(True, "then") for s in loaded.stages})
    assert run_curriculum(loaded, wait=True) == 0
    assert f"all {len(loaded.stages)} stages are done" in capsys.readouterr().err


def test_no_stage_trains_on_what_another_one_scores(tree: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", tree)
    check(load_curriculum(path), done=set())
    stage(tree, "evaluate")["overrides"]["data"]["split"] = "train"
    said = refused(tree, tmp_path)
    assert "stage evaluate scores 4 videos that stage finetune is trained on (train_00000, " in said
    assert "cache.held_out" in said
    check(load_curriculum(path, ["leaks=allow"]), done=set())
    refcoco = stage(tree, "cache_refcoco")["overrides"]["data"]
    stage(tree, "evaluate")["overrides"]["data"] = {**refcoco, "split": "refcoco/unc/train"}
    assert "2 videos that stage pretrain is trained on" in refused(tree, tmp_path)


def test_no_stage_trains_on_whole_videos_that_a_training_scores_on_the_way(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    data = {"source": "mevis", **stage(tree, "evaluate")["overrides"]["data"], "split": "train"}
    scored = {"every_steps": 1, "whole_videos": {"data": data, "videos": 3}}
    stage(tree, "finetune").setdefault("overrides", {})["evaluate"] = scored
    assert "stage finetune scores 3 videos that stage finetune is trained on (train_0" in refused(tree, tmp_path)


@pytest.mark.long
def test_a_curriculum_killed_at_any_time_ends_with_the_weights_and_scores_of_an_undisturbed_one(
    world: Path, tmp_path: Path
) -> None:
    trials, seed = TRIALS, SEED
    alone = tmp_path / "alone"
    alone.mkdir()
    begun = time.monotonic()
    assert flowmask("curriculum", write(alone / "c.yaml", curriculum(world, alone)), timeout_s=900).returncode == 0
    whole_s = time.monotonic() - begun
    draw = random.Random(seed)
    for trial in range(trials):
        out = tmp_path / str(trial)
        out.mkdir()
        path = write(out / "c.yaml", curriculum(world, out))
        for _ in range(3):
            command = start_flowmask("curriculum", path)
            try:
                command.wait(timeout=draw.uniform(0.05, 0.6) * whole_s)
            except subprocess.TimeoutExpired:
                command.kill()
                command.wait()
        done = flowmask("curriculum", path, timeout_s=900)
        assert done.returncode == 0, (seed, trial, done.stderr)
        for name in ("decoder", "pretrain", "finetune"):
            assert not unequal_tensors(alone / name, out / name), (seed, trial, name)
        scores = [
            json.loads((place / "evaluate" / "scores.json").read_text())["per_expression"] for place in (alone, out)
        ]
        assert scores[0] == scores[1], (seed, trial)
