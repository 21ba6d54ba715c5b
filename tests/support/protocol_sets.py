"""Golden sets of the benchmarks' public code: our protocols' results on the same inputs, laid out as expected.json."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flowmask.trainer.score.protocols import a2d_jhmdb, davis, grefcoco, image_iou, long_rvos, mevis, revos
from flowmask.trainer.score.protocols.answers import agreement

Inputs = Mapping[str, Any]
Meta = Mapping[str, Any]


def load(folder: Path) -> tuple[Inputs, Meta]:
    """The arrays and the description of one set."""
    return np.load(folder / "inputs.npz"), json.loads((folder / "meta.json").read_text())


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every number and string of nested objects and lists, by its path."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: value for key, part in items for name, value in leaves(part, f"{path}/{key}".lstrip("/")).items()}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str], *, scale: float = 1.0) -> dict[str, Any]:
    return {theirs: row[ours] * scale for ours, theirs in names.items()}


def of_mevis(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    items = {}
    for video in meta["videos"]:
        for exp_id, expression in video["expressions"].items():
            shape = (len(video["frames"]), video["height"], video["width"])
            truth = np.zeros(shape, bool)
            for anno_id in expression["anno_id"]:
                truth |= inputs[f"anno/{anno_id}"] > 0
            key = f"pred/{video['name']}/{exp_id}"
            predicted = None if video["missing"] else inputs[key] > 0
            items[f"{video['name']}_{exp_id}"] = agreement(truth, predicted, has_target=bool(expression["anno_id"]))
    found = mevis.overall(list(items.values()))
    second = {
        "n_acc": "N-acc",
        "t_acc": "T-acc",
        "j_target": "J_target_only",
        "f_target": "F_target_only",
        "jf_target": "J&F_target_only",
        "final": "Final_if_J&F_over_all",
        "final_target": "Final_if_J&F_over_target_only",
    }
    return {
        "items": {name: {"J": item.j, "F": item.f} for name, item in items.items()},
        "overall_all_expressions": _renamed(found, {"j": "J", "f": "F", "jf": "J&F"}, scale=0.01),
        "v2_by_rule_not_from_public_code": {
            **_renamed(found, second, scale=0.01),
            "no_target": sum(not item.has_target for item in items.values()),
            "target": sum(item.has_target for item in items.values()),
        },
    }


def of_long_rvos(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    names = {"j": "J", "f": "F", "t_iou": "tIoU", "v_iou": "vIoU"}
    items, rows = {}, []
    for video in meta["videos"]:
        for exp_id, expression in video["expressions"].items():
            truth = inputs[f"gt/{video['name']}/{expression['obj_id']}"] > 0
            predicted = None if video["missing"] else inputs[f"pred/{video['name']}/{exp_id}"] > 0
            found = long_rvos.expression(truth, predicted)
            rows.append((expression["type"], found))
            items[f"{video['name']}_{exp_id}"] = _renamed(found, names)
    table = long_rvos.overall(rows)
    return {"items": items, "overall": {kind: _renamed(row, names | {"jf": "J&F"}) for kind, row in table.items()}}


def of_revos(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    names = {"j": "J", "f": "F", "a": "A", "r": "R"}
    items, rows = {}, []
    for video in meta["videos"]:
        for exp_id, expression in video["expressions"].items():
            instances = [inputs[f"anno/{k}"] > 0 for k in expression["anno_id"]]
            foreground = inputs[f"foreground/{video['name']}"] > 0
            predicted = None if video["missing"] else inputs[f"pred/{video['name']}/{exp_id}"] > 0
            found = revos.expression(instances, foreground, predicted)
            rows.append((expression["type_id"], found))
            items[f"{video['name']}_{exp_id}"] = _renamed(found, names)
    table = revos.overall(rows)
    return {"items": items, "overall": {kind: _renamed(row, names | {"jf": "JF"}) for kind, row in table.items()}}


def of_ref_davis17(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    names = {"j": "J-Mean", "j_recall": "J-Recall", "j_decay": "J-Decay"}
    names |= {"f": "F-Mean", "f_recall": "F-Recall", "f_decay": "F-Decay", "jf": "J&F-Mean"}
    each = {ours: theirs for ours, theirs in names.items() if ours != "jf"} | {"j": "J", "f": "F"}
    probabilities = {v["name"]: inputs[f"{v['name']}/prob"] / np.float32(meta["prob_scale"]) for v in meta["videos"]}
    truths = {v["name"]: inputs[f"{v['name']}/labels"] for v in meta["videos"]}
    fused, result = {}, {}
    for number in range(meta["annotators"]):
        for name, of_video in probabilities.items():
            fused[f"anno_{number}/{name}"] = davis.fuse(of_video[number])
    for convention in ("semi_supervised", "unsupervised"):
        things = [
            {
                f"{name}_{place}": thing
                for name, truth in truths.items()
                for place, thing in enumerate(
                    davis.annotator(truth, fused[f"anno_{number}/{name}"], convention=convention), start=1
                )
            }
            for number in range(meta["annotators"])
        ]
        rows, final = davis.overall([list(of_one.values()) for of_one in things])
        annotators = [
            {**_renamed(row, names), "per_object": {key: _renamed(thing, each) for key, thing in of_one.items()}}
            for row, of_one in zip(rows, things)
        ]
        result[convention] = {"annotators": annotators, "final": _renamed(final, names)}
    objects = {v["name"]: v["objects"] for v in meta["videos"]}
    described = {key: _described(labels, objects[key.split("/")[1]]) for key, labels in fused.items()}
    return {"fused": described, **result} | {"per_expression": _each_expression(meta, truths, probabilities)}


def _described(labels: Any, objects: int) -> dict[str, Any]:
    counts = [int((labels == k).sum()) for k in range(objects + 1)]
    return {"sha256_uint8_thw": hashlib.sha256(labels.tobytes()).hexdigest(), "pixels_per_label": counts}


def _each_expression(meta: Meta, truths: Mapping[str, Any], probabilities: Mapping[str, Any]) -> dict[str, Any]:
    items = {}
    for video in meta["videos"]:
        truth, of_video = truths[video["name"]], probabilities[video["name"]]
        for place, (thing, annotator) in enumerate(davis.roles(len(video["expressions"]))):
            found = davis.expression(truth, thing, of_video[annotator, thing] >= davis.THRESHOLD)
            items[f"{video['name']}_{place}"] = {"J": found.j, "F": found.f}
    j, f = (float(np.mean([item[name] for item in items.values()])) for name in "JF")
    return {"items": items, "overall": {"J": j, "F": f, "J&F": (j + f) / 2}}


def of_refcoco(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    ids = [item["id"] for item in meta["items"]]
    overlaps = [image_iou.overlap(inputs[f"gt/{i}"] > 0, inputs[f"pred/{i}"] > 0) for i in ids]
    precisions = {f"precision_{t}": f"P@{t}" for t in image_iou.THRESHOLDS}
    found = {c: image_iou.overall(overlaps, convention=c) for c in image_iou.CONVENTIONS}
    each = {c: dict(zip(ids, image_iou.ious(overlaps, convention=c).tolist())) for c in image_iou.CONVENTIONS}
    names = {"o_iou": "oIoU", "m_iou": "mIoU", **precisions}
    sums = {"cum_I": sum(o.intersection for o in overlaps), "cum_U": sum(o.union for o in overlaps)}
    return {
        "lavt": {
            "items": {i: {"iou": each["lavt"][i]} for i in ids},
            "overall": {**_renamed(found["lavt"], names), **sums, "count": len(ids)},
        },
        "referformer": {
            "items": {
                i: {"iou": each["referformer"][i], "I": o.intersection, "U": o.union} for i, o in zip(ids, overlaps)
            },
            "overall": _renamed(found["referformer"], names),
        },
        "sa2va": {"overall": {**_renamed(found["sa2va"], {"o_iou": "cIoU", "m_iou": "gIoU"}), "count": len(ids)}},
    }


def of_grefcoco(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    names = {"g_iou": "gIoU", "c_iou": "cIoU", **{f"precision_{t}": f"Pr@{t}" for t in grefcoco.THRESHOLDS}}
    accuracies = {"t_acc": "T_acc", "n_acc": "N_acc"}

    def samples(source: str | None, *, head: bool) -> list[grefcoco.Sample]:
        return [
            grefcoco.sample(
                inputs[f"gt/{item['id']}"] > 0,
                inputs[f"pred/{item['id']}"] > 0,
                has_target=not item["gt_no_target"],
                says_nothing=item["nt_scores"][1] > item["nt_scores"][0] if head else None,
            )
            for item in meta["items"]
            if source in (None, item["source"])
        ]

    def table(source: str | None, *, head: bool = True) -> dict[str, Any]:
        found = grefcoco.overall(samples(source, head=head))
        return _renamed(found, names if source is None else names | accuracies)

    return {
        "grefcoco_only": {"grefcoco": table("grefcoco")},
        "both_sources": {"refcoco": table("refcoco"), "grefcoco": table("grefcoco"), "full": table(None)},
        "grefcoco_only_empty_mask_rule": {"grefcoco": table("grefcoco", head=False)},
    }


def of_a2d_jhmdb(inputs: Inputs, meta: Meta) -> dict[str, Any]:
    samples = {
        item["id"]: a2d_jhmdb.answered(
            inputs[f"gt/{item['id']}"] > 0, inputs[f"pred/{item['id']}"] > 0, inputs[f"score/{item['id']}"].tolist()
        )
        for item in meta["items"]
    }
    overlaps = {key: image_iou.Overlap(*one["best"]) for key, one in samples.items()}
    ious = image_iou.ious(list(overlaps.values()), convention="referformer").tolist()
    names = {"o_iou": "oIoU", "m_iou": "mIoU", **{f"precision_{t}": f"P@{t}" for t in image_iou.THRESHOLDS}}
    names |= {"map": "mAP", "ap_50": "AP50", "ap_75": "AP75"}
    names |= {"ap_small": "AP_S", "ap_medium": "AP_M", "ap_large": "AP_L"}
    return {
        "items": {
            key: {"iou": iou, "I": o.intersection, "U": o.union} for (key, o), iou in zip(overlaps.items(), ious)
        },
        "overall": _renamed(a2d_jhmdb.overall(samples), names),
    }


COMPUTED: dict[str, Callable[[Inputs, Meta], dict[str, Any]]] = {
    "mevis": of_mevis,
    "long_rvos": of_long_rvos,
    "revos": of_revos,
    "ref_davis17": of_ref_davis17,
    "refcoco": of_refcoco,
    "grefcoco": of_grefcoco,
    "a2d_jhmdb": of_a2d_jhmdb,
}
