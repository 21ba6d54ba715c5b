"""Evaluation while training: fixed examples, the same numbers at any world size, no effect on the training."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from runs import SignalAt, cache_settings, losses, rows, run_group, start

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.errors import ConfigError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.run.validate import fixed_examples, refuse_other_conventions
from flowmask.trainer.run.validate_overlays import ClipOverlays
from flowmask.trainer.state.checkpoint import read_state
from flowmask.trainer.state.steps import complete

OFTEN = {"evaluate.every_steps": 2, "evaluate.examples": 5, "evaluate.jf_examples": 3}
EXACT = {"train.precision": "fp32", "train.micro_batch": 1}


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`never` and `often`: the same run without and with evaluations."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert start(lab, folder / "never", EXACT) == 0
    assert start(lab, folder / "often", EXACT | OFTEN | {"evaluate.cache": str(lab / "cache")}) == 0
    return folder


def test_evaluating_leaves_every_row_of_the_training_as_it_was(evaluated: Path) -> None:
    never, often = rows(evaluated / "never"), rows(evaluated / "often")
    for key in ("step", "loss", "grad_norm", "lr", "batch", "loss_at_video", "loss_elsewhere"):
        assert [row.get(key) for row in often] == [row.get(key) for row in never]


def test_losses_at_the_fixed_timesteps_and_the_scores_are_recorded_and_the_best_is_kept(evaluated: Path) -> None:
    found = evaluations(evaluated / "often")
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10]
    for row in found:
        at = [row[f"eval_loss_t{timestep}"] for timestep in (1000, 800, 600, 400, 200, 1)]
        assert row["eval_loss"] == pytest.approx(sum(at) / 6, rel=1e-6)
        assert row["eval_jf"] == pytest.approx((row["eval_j"] + row["eval_f"]) / 2)
        assert 0 <= row["eval_jf"] <= 100
    assert found[-1]["eval_loss"] < found[0]["eval_loss"]
    best = max(found, key=lambda row: (row["eval_jf"], -row["step"]))["step"]
    link = (evaluated / "often" / "checkpoints" / "best").resolve()
    assert read_state(link)["step"] == best and [row["step"] for row in found if row["best"]][-1] == best
    log = (evaluated / "often" / "log.txt").read_text()
    assert "evaluated step 10: loss " in log and "evaluating on 5 examples" in log


def test_the_best_is_kept_when_later_ones_push_it_out(lab: Path, tmp_path: Path, evaluated: Path) -> None:
    run = shutil.copytree(evaluated / "often", tmp_path / "run", symlinks=True)
    link = run / "checkpoints" / "best"
    link.unlink()
    link.symlink_to(min(complete(run / "checkpoints")).name)
    kept = link.resolve().name
    assert start(lab, run, EXACT | {"train.steps": 13, "checkpoint.every_steps": 1}) == 0
    assert [path.name for path in complete(run / "checkpoints")] == ["step_00000013", "step_00000012", kept]


def test_the_numbers_do_not_depend_on_the_number_of_ranks_or_the_zero_stage(
    lab: Path, tmp_path: Path, evaluated: Path
) -> None:
    jobs = []
    for stage in (1, 3):
        overrides = EXACT | OFTEN | {"train.zero_stage": stage, "evaluate.every_steps": 5}
        jobs.append({"lab": str(lab), "out": str(tmp_path / str(stage)), "overrides": overrides})
    run_group(jobs, folder=tmp_path / "logs")
    start(lab, tmp_path / "one", EXACT | OFTEN | {"evaluate.every_steps": 5})
    for stage in (1, 3):
        assert losses(tmp_path / str(stage)) == pytest.approx(losses(evaluated / "never"), rel=1e-5)
        for two, one in zip(evaluations(tmp_path / str(stage)), evaluations(tmp_path / "one"), strict=True):
            assert two.keys() == one.keys() and two.pop("definition") == one.pop("definition")
            for name, value in one.items():
                rough = name in ("eval_j", "eval_f", "eval_jf")  # a pixel at the threshold may flip
                assert two[name] == pytest.approx(value, rel=1e-5, abs=2.0 if rough else 0)


def test_a_stop_between_a_step_and_its_evaluation_costs_neither(lab: Path, tmp_path: Path, evaluated: Path) -> None:
    every = EXACT | OFTEN | {"evaluate.every_steps": 5, "evaluate.cache": str(lab / "cache")}
    start(lab, tmp_path / "never", every)
    with SignalAt.on_every_run():
        assert start(lab, tmp_path / "run", every) == REQUEUE_EXIT_CODE
    assert evaluations(tmp_path / "run") == []
    assert start(lab, tmp_path / "run", every) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "never")
    best = [read_state((tmp_path / n / "checkpoints" / "best").resolve())["step"] for n in ("run", "never")]
    assert best[0] == best[1]


def test_a_mask_decoder_is_scored_on_the_true_latents(lab: Path, tmp_path: Path) -> None:
    decoder = {"objective.kind": "mask_decoder", "train.steps": 4, "evaluate.every_steps": 2}
    assert start(lab, tmp_path / "run", decoder | {"evaluate.examples": 2}) == 0
    found = evaluations(tmp_path / "run")
    keys = {"step", "eval_loss", "eval_j", "eval_f", "eval_jf", "best", "definition"}
    assert [set(row) for row in found] == [keys] * 2
    assert "which is also the training data: set evaluate.cache" in (tmp_path / "run" / "log.txt").read_text()


def test_fixed_examples_are_of_the_first_view_spread_out_and_never_change() -> None:
    buckets = [Bucket("a", (0, 100), (100, 100)), Bucket("b", (200, 250), (50, 50))]
    chosen = fixed_examples(buckets, 30)
    assert chosen == fixed_examples(buckets, 30) and len(set(chosen)) == 30
    assert all(i < 100 or 200 <= i < 250 for i in chosen) and any(i >= 200 for i in chosen)
    assert fixed_examples(buckets, 10) == chosen[:10]
    assert sorted(fixed_examples(buckets, 1000)) == [*range(100), *range(200, 250)]
    with pytest.raises(ConfigError, match="no example"):
        fixed_examples([Bucket("a", (0,), (0,))], 3)


def test_a_held_out_cache_of_other_conventions_is_refused_by_name(lab: Path, tmp_path: Path) -> None:
    from flowmask.data_pipeline.build.build import build
    from flowmask.data_pipeline.config import CacheBuildConfig

    torch.set_num_threads(1)
    other = cache_settings(lab) | {"out": tmp_path / "other"}
    other["cache"] = other["cache"] | {"pixel_norm": "imagenet"}
    build(CacheBuildConfig.model_validate(other))
    with pytest.raises(ConfigError, match=r"other has pixel_norm imagenet, the training's cache has half"):
        refuse_other_conventions(CacheReader(tmp_path / "other"), CacheReader(lab / "cache"))


def test_some_of_the_scored_examples_are_drawn_and_the_drawing_changes_no_number(
    lab: Path, tmp_path: Path, evaluated: Path
) -> None:
    drawn = sorted((evaluated / "often" / "overlays").iterdir())
    assert [folder.name for folder in drawn] == [f"step_{step:08d}" for step in (2, 4, 6, 8, 10)]
    reader = CacheReader(lab / "cache")
    for folder in drawn:
        ids = [int(path.stem.removeprefix("example_")) for path in sorted(folder.iterdir())]
        assert len(ids) == 2
        for path, example in zip(sorted(folder.iterdir()), ids, strict=True):
            with av.open(str(path)) as video:
                pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            masks = reader.read(np.array([example]), needs={"mask_pixels"}, text_tokens=0)["mask_pixels"][0]
            assert len(pictures) == len(masks)
    assert start(lab, tmp_path / "run", EXACT | OFTEN | {"evaluate.overlays": 0}) == 0
    assert not (tmp_path / "run" / "overlays").exists()
    assert evaluations(tmp_path / "run") == evaluations(evaluated / "often")


def test_a_picture_that_cannot_be_written_is_a_line_and_not_the_end(lab: Path, tmp_path: Path) -> None:
    said: list[str] = []
    reader = CacheReader(lab / "cache")
    drawer = ClipOverlays(reader, WanFolder(lab / "wan").vae(), say=said.append)
    truth = reader.read(np.array([0]), needs={"mask_pixels"}, text_tokens=0)["mask_pixels"][0].numpy()
    (tmp_path / "file").touch()
    drawer.write(tmp_path / "file" / "folder", 0, predicted=truth, truth=truth)
    assert len(said) == 1 and "example_0.mp4 could not be written" in said[0]
