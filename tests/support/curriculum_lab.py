"""A tiny setting for curricula: Wan, RefCOCO and MeViS in their published layouts, and the YAML of the whole recipe."""

import json
from pathlib import Path
from typing import Any

import yaml
from layouts import write_refcoco
from runs import CLIP, write_small_wan

TRAIN = {"steps": 4, "lr": 2e-3, "global_batch": 2, "micro_batch": 2, "log_every_steps": 1, "precision": "fp32"}


def write_world(folder: Path) -> None:
    """`wan`, `refcoco` and `mevis` (train, valid_u, and valid without masks) below `folder`."""
    from flowmask.data_pipeline.sources.synthetic import write_synthetic

    write_small_wan(folder / "wan")
    (folder / "refcoco").mkdir()
    write_refcoco(folder / "refcoco")
    for split, videos in (("train", 4), ("valid_u", 2), ("valid", 2)):
        write_synthetic(folder / "mevis", split=split, videos=videos, seed=0)
    valid = folder / "mevis" / "valid"
    (valid / "mask_dict.json").unlink()
    meta = json.loads((valid / "meta_expressions.json").read_text())
    for video in meta["videos"].values():
        for expression in video["expressions"].values():
            for key in ("anno_id", "obj_id"):
                expression.pop(key, None)
    (valid / "meta_expressions.json").write_text(json.dumps(meta))


def curriculum(world: Path, out: Path) -> dict[str, Any]:
    """The stages of configs/curriculum_refcoco_mevis.yaml at the smallest size."""
    train = {
        "model": {"wan": str(world / "wan"), "text_tokens": 16},
        "train": TRAIN,
        "checkpoint": {"every_steps": 1},
        "ema": {"decay": 0.5},
        "tracking": {"enabled": False},
    }
    cache = {"model": {"wan": str(world / "wan")}, "cache": {"clips_per_shard": 2, "device": "cpu"}}
    score = {"sampler": {"steps": 1}, "precision": "fp32", "device": "cpu"}
    score |= {"box": {"height_px": 32, "width_px": 64}}
    data = {"source": "mevis", "root": str(world / "mevis")}
    return {
        "out": str(out / "curriculum"),
        "launch": {"cluster": "local"},
        "stages": [
            stage("cache_refcoco", "cache", out, cache)
            | {
                "overrides": {
                    "data": {"source": "refcoco", "root": str(world / "refcoco"), "split": "refcoco/unc/train"},
                    "clip": {**CLIP, "frames": 1},
                }
            },
            stage("cache_mevis", "cache", out, cache)
            | {"overrides": {"data": {**data, "split": "train"}, "clip": {**CLIP, "frames": 5}}},
            stage("decoder", "decoder", out, train)
            | {
                "needs": ["cache_mevis"],
                "overrides": {"objective.kind": "mask_decoder"},
                "carries": {"data.cache": "${stages.cache_mevis.out}"},
            },
            stage("pretrain", "train", out, train)
            | {
                "needs": ["cache_refcoco", "decoder"],
                "carries": {"data.cache": "${stages.cache_refcoco.out}", "model.mask_decoder": "${stages.decoder.out}"},
            },
            stage("finetune", "train", out, train)
            | {
                "needs": ["cache_mevis", "pretrain"],
                "carries": {
                    "data.cache": "${stages.cache_mevis.out}",
                    "model.init": "${stages.pretrain.out}",
                    "model.mask_decoder": "${stages.decoder.out}",
                    "model.text_tokens": "${stages.pretrain.model.text_tokens}",
                },
            },
            stage("evaluate", "evaluate", out, score)
            | {
                "needs": ["finetune"],
                "overrides": {"data": {**data, "split": "valid_u"}},
                "carries": {"checkpoint": "${stages.finetune.out}"},
            },
            stage("submission", "evaluate", out, score)
            | {
                "needs": ["finetune"],
                "overrides": {"data": {**data, "split": "valid"}, "archive": "mevis"},
                "carries": {"checkpoint": "${stages.finetune.out}"},
            },
        ],
    }


def stage(name: str, kind: str, out: Path, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "config": {"out": str(out / name), **config}}


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
