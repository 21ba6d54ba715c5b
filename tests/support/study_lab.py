"""A study at the smallest size: its data and weights, two trainings, a row that only scores."""

from pathlib import Path
from typing import Any

import yaml

TRAIN: dict[str, Any] = {
    "out": "unsaid",
    "model": {"wan": "unsaid", "text_tokens": 16},
    "data": {"cache": "unsaid"},
    "train": {"steps": 3, "lr": 2e-3, "global_batch": 2, "micro_batch": 2, "log_every_steps": 1, "precision": "fp32"},
    "checkpoint": {"every_steps": 2},
    "ema": {"decay": 0.5},
    "tracking": {"end_timeout_s": 300},  # MLflow's database takes long on a busy machine
}
SCORE = {"out": "unsaid", "checkpoint": "unsaid", "precision": "fp32", "device": "cpu", "sampler": {"steps": 1}}


def write_study(folder: Path) -> Path:
    clip = {"sampling": "whole", "frames": 5, "short_side": 32, "long_side": 32, "size_multiple": 16, "augment": False}
    cache = {
        "out": str(folder / "cache"),
        "model": {"wan": "${values.untrained_wan}"},
        "data": {"source": "mevis", "root": "${values.dataset}", "split": "train"},
        "clip": clip,
        "cache": {"clips_per_shard": 4},
    }
    files = {
        "video.yaml": {**TRAIN, "objective": {"kind": "text_to_video"}},
        "plain.yaml": {**TRAIN, "objective": {"boundary_bias": False}},
        "biased.yaml": TRAIN,
        "score.yaml": {
            **SCORE,
            "data": {"source": "mevis", "root": "unsaid", "split": "valid_u"},
            "box": {"height_px": 32, "width_px": 32},
        },
    }
    rows = [
        {"name": "plain", "title": "plain", "published": 40.0, "config": "plain.yaml"},
        {"name": "biased", "title": "bia|sed <b>", "published": 50.0, "config": "biased.yaml", "against": "plain"},
        {"name": "twice", "title": "two steps", "of": "biased", "evaluation": {"sampler.steps": 2}},
    ]
    sizes = {"seed": 0, "frames": 5, "size_px": 32, "train_videos": 2, "valid_videos": 2}
    files["study.yaml"] = {
        "out": str(folder / "study"),
        "title": "a small study",
        "launch": {"cluster": "debug"},
        "world": {
            "dataset": {**sizes, "no_target": {"train": 0, "valid_u": 1}},
            "cache": "cache",
            "start": "video.yaml",
        },
        "stages": [{"name": "cache", "kind": "cache", "config": cache}],
        "training": {
            "needs": ["cache"],
            "overrides": {"model.wan": "${values.wan}"},
            "carries": {"data.cache": "${stages.cache.out}"},
        },
        "evaluation": {"config": "score.yaml", "overrides": {"data.root": "${values.dataset}"}},
        "rows": rows,
    }
    for name, tree in files.items():
        (folder / name).write_text(yaml.safe_dump(tree))
    return folder / "study.yaml"
