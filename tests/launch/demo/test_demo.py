"""The demo works from dataset to prediction, leaves its documented files, and each part repeats from its config."""

import hashlib
import json
import math
from pathlib import Path

import av
import pytest
import torch
from command import flowmask
from rich.console import Console

from flowmask.data_pipeline.sources.synthetic_scene import NO_SUCH_COLOUR, OTHER_MOTION
from flowmask.launch.demo import demo
from flowmask.launch.demo.demo import Profile
from flowmask.launch.demo.report import refuse_skips
from flowmask.models.errors import TrainingError

REPORT_KEYS = {
    "jf", "j", "f", "jf_shuffled_text", "train_loss_first", "train_loss_last",
    "jf_target", "n_acc", "t_acc", "final", "decoder_jf", "cache_clips_per_s", "train_samples_per_s", "wall_s",
}  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_demo_fills_every_named_place(smoke: Path) -> None:
    for name in ("dataset", "wan", "cache", "runs/decoder", "runs/dit", "predict", "mlflow.db", "report.json"):
        assert (smoke / name).exists(), name


def test_the_report_holds_measured_figures(smoke: Path) -> None:
    report = json.loads((smoke / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert all(math.isfinite(report[key]) for key in REPORT_KEYS)
    scores = json.loads((smoke / "evaluate" / "scores.json").read_text())
    per_expression = scores["per_expression"].values()
    assert report["jf"] == pytest.approx(sum(s["jf"] for s in per_expression) / len(per_expression))
    assert all(0 <= s[key] <= 100 for s in per_expression for key in ("j", "f", "jf"))
    assert scores["slices"]["kind"].keys() == {NO_SUCH_COLOUR, OTHER_MOTION}


def test_no_split_of_the_demo_shows_a_video_of_another_and_each_has_sentences_that_name_nothing(smoke: Path) -> None:
    seen: set[str] = set()
    for split in ("train", "calibrate", "valid_u"):
        frames = {
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (smoke / "dataset" / split / "JPEGImages").rglob("*.jpg")
        }
        assert frames and frames.isdisjoint(seen)
        seen |= frames
        meta = json.loads((smoke / "dataset" / split / "meta_expressions.json").read_text())["videos"]
        told = demo.load_settings(Profile.SMOKE)["no_target"][split]
        assert told > 0
        for entry in meta.values():
            assert sum(not expression["anno_id"] for expression in entry["expressions"].values()) == told


def test_every_expression_has_a_mask_for_every_frame(smoke: Path) -> None:
    meta = json.loads((smoke / "dataset" / "valid_u" / "meta_expressions.json").read_text())["videos"]
    expected = {
        f"{video}/{exp_id}/{frame}.png"
        for video, entry in meta.items()
        for exp_id in entry["expressions"]
        for frame in entry["frames"]
    }
    masks = smoke / "evaluate" / "masks"
    assert {str(path.relative_to(masks)) for path in masks.rglob("*.png")} == expected


def test_the_overlay_is_a_video_of_every_frame(smoke: Path) -> None:
    with av.open(str(smoke / "predict" / "overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_no_step_of_a_demo_is_skipped_and_one_that_was_fails_it_in_one_line(smoke: Path, tmp_path: Path) -> None:
    for name in ("decoder", "dit"):
        run = smoke / "runs" / name
        assert not any(json.loads(row).get("skipped") for row in (run / "metrics.jsonl").read_text().splitlines())
        assert (run / "log.txt").read_text().rstrip().endswith("; no step skipped")
        refuse_skips(run)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "skipped": true}\n')
    with pytest.raises(TrainingError, match=r"skipped 1 steps \(2\)"):
        refuse_skips(tmp_path)


def test_a_run_leaves_one_row_for_each_step(smoke: Path) -> None:
    run = smoke / "runs" / "dit"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "batch",
        "world_size",
        "time",
        "examples_per_s",
        "data_wait_pct",
    }
    assert all(row.keys() >= keys for row in rows)
    assert (run / "checkpoints" / "latest").exists()
    assert "loss" in (run / "log.txt").read_text()


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize(("gpus", "training"), [(1, 1), (4, 2), (8, 2)])
def test_the_demo_trains_in_as_many_processes_as_share_its_batches(
    gpus: int, training: int, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft  # noqa: F401  asks for a real GPU when it is first imported

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(demo, "run", lambda job: asked.append((job.KIND, job.launch.processes_per_node)) or 0)
    monkeypatch.setattr(demo.DemoRun, "_predict", lambda self: None)
    for part in ("write_dataset", "write_wan"):
        monkeypatch.setattr(demo, part, lambda *_, **__: None)
    monkeypatch.setattr(demo, "refuse_skips", lambda run: None)  # no run exists
    demo.DemoRun(tmp_path, demo.load_settings(profile), Console(quiet=True)).run()
    assert asked == [("cache", gpus), ("train", training), ("train", training), ("evaluate", gpus)]


def test_the_same_demo_again_finds_everything_done(smoke: Path) -> None:
    before = hashes(smoke / "cache") | hashes(smoke / "runs" / "dit" / "checkpoints")
    again = flowmask("demo", "--smoke", "--out", smoke)
    assert again.returncode == 0, again.stderr
    assert hashes(smoke / "cache") | hashes(smoke / "runs" / "dit" / "checkpoints") == before


def test_a_demo_of_other_settings_is_refused_where_one_is(smoke: Path) -> None:
    refused = flowmask("demo", "--full", "--out", smoke)
    assert refused.returncode == 2
    assert "other settings" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_cache_rebuilt_from_its_config_by_another_number_of_workers_is_the_same_bytes(
    smoke: Path, tmp_path: Path
) -> None:
    other = tmp_path / "cache"
    built = flowmask("cache", "build", smoke / "cache" / "config.yaml", f"out={other}", "launch.processes_per_node=1")
    assert built.returncode == 0, built.stderr
    ours, theirs = hashes(smoke / "cache"), hashes(other)
    assert {k: v for k, v in ours.items() if k != "config.yaml"} == {
        k: v for k, v in theirs.items() if k != "config.yaml"
    }


def test_a_run_repeated_from_its_config_has_the_same_losses(smoke: Path, tmp_path: Path) -> None:
    other = tmp_path / "dit"
    done = flowmask("train", smoke / "runs" / "dit" / "config.yaml", f"out={other}")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        [(row["step"], row["loss"], row["batch"]) for row in map(json.loads, path.read_text().splitlines())]
        for path in (smoke / "runs" / "dit" / "metrics.jsonl", other / "metrics.jsonl")
    )
    assert ours == theirs


def test_an_evaluation_repeated_from_its_config_has_the_same_scores(smoke: Path, tmp_path: Path) -> None:
    done = flowmask(
        "evaluate",
        smoke / "evaluate" / "config.yaml",
        f"data.root={smoke / 'dataset'}",
        f"calibrate.data.root={smoke / 'dataset'}",
        f"checkpoint={smoke / 'runs' / 'dit'}",
        f"out={tmp_path / 'scores'}",
        "max_videos=1",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((folder / "scores.json").read_text())["per_expression"]
        for folder in (smoke / "evaluate", tmp_path / "scores")
    )
    assert theirs and ours.items() >= theirs.items()


def test_a_fresh_cache_verifies_and_a_damaged_one_is_named(smoke: Path, tmp_path: Path) -> None:
    import shutil

    assert flowmask("cache", "verify", smoke / "cache").returncode == 0
    copy = tmp_path / "cache"
    shutil.copytree(smoke / "cache", copy)
    shard = sorted((copy / "shards").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    verified = flowmask("cache", "verify", copy)
    assert verified.returncode == 1
    assert shard.name in verified.stdout
