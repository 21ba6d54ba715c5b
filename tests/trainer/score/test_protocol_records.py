"""Scoring by a protocol: the videos' records give the numbers of the benchmarks' own code."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from protocol_sets import leaves
from protocol_videos import GOLDEN, SETS, HeldVideo, a2d_wanted

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.sources.base import Expression
from flowmask.models.errors import ConfigError, DataError
from flowmask.trainer.predict.inference import masks_of
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.protocols import _KNOWN, in_scores, protocol_named
from flowmask.trainer.score.protocols.a2d_sentences import Confidences
from flowmask.trainer.score.protocols.ref_davis17 import Competition

_IOU = {"o_iou": "oIoU", "m_iou": "mIoU", **{f"precision_{t}": f"P@{t}" for t in (0.5, 0.6, 0.7, 0.8, 0.9)}}
_LONG = {"j": "J", "f": "F", "jf": "J&F", "t_iou": "tIoU", "v_iou": "vIoU"}
_REVOS = {"j": "J", "f": "F", "jf": "JF", "a": "A", "r": "R"}


def _row(path: str, names: Mapping[str, str], *, of: Any, scale: float = 100) -> dict[str, float]:
    return {f"{path}/{ours}": scale * of[theirs] for ours, theirs in names.items()}


def _wanted(name: str, answered: Any) -> dict[str, float | None]:
    """Leaves of the tables, in percent, from expected.json."""
    if name.endswith("_sentences"):
        found = a2d_wanted(answered)
        return {f"referformer/all/{key}": None if value == -1 else 100 * value for key, value in found.items()}
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    if name == "mevis":
        v1, v2 = expected["overall_all_expressions"], expected["v2_by_rule_not_from_public_code"]
        accuracies = {"n_acc": "N-acc", "t_acc": "T-acc"}
        first = accuracies | {"final": "Final_if_J&F_over_all"}
        second = {ours: f"{theirs}_target_only" for ours, theirs in (("j", "J"), ("f", "F"), ("jf", "J&F"))}
        second |= accuracies | {"final": "Final_if_J&F_over_target_only"}
        return {
            **_row("all_expressions/all", {"j": "J", "f": "F", "jf": "J&F"}, of=v1),
            **_row("all_expressions/all", first, of=v2),
            **_row("target_expressions/all", second, of=v2),
        }
    if name in ("revos", "long_rvos"):
        convention, names, scale = ("visa", _REVOS, 1) if name == "revos" else ("long_rvos", _LONG, 100)
        rows = (_row(f"{convention}/{k}", names, of=row, scale=scale) for k, row in expected["overall"].items())
        return {path: value for row in rows for path, value in row.items()}
    if name == "ref_davis17":
        return _wanted_of_davis(expected)
    if name == "grefcoco":
        row = expected["grefcoco_only_empty_mask_rule"]["grefcoco"]
        names = {"g_iou": "gIoU", "c_iou": "cIoU", **{f"precision_{t}": f"Pr@{t}" for t in (0.7, 0.8, 0.9)}}
        accuracies = _row("empty_mask/all", {"n_acc": "N_acc", "t_acc": "T_acc"}, of=row)
        return _row("empty_mask/all", names, of=row, scale=1) | accuracies
    return {
        **_row("referformer/all", _IOU, of=expected["referformer"]["overall"]),
        **_row("lavt/all", _IOU, of=expected["lavt"]["overall"]),
        **_row("sa2va/all", {"o_iou": "cIoU", "m_iou": "gIoU"}, of=expected["sa2va"]["overall"]),
    }


def _wanted_of_davis(expected: Any) -> dict[str, float]:
    of_object = ("J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay", "J&F-Mean")
    names = dict(zip(("j", "j_recall", "j_decay", "f", "f_recall", "f_decay", "jf"), of_object))
    found = _row("per_expression/all", {"j": "J", "f": "F", "jf": "J&F"}, of=expected["per_expression"]["overall"])
    for convention in ("unsupervised", "semi_supervised"):
        found |= _row(f"{convention}/mean", names, of=expected[convention]["final"])
        for number, row in enumerate(expected[convention]["annotators"]):
            found |= _row(f"{convention}/annotator {number}", names, of=row)
    return found


@cache
def _answered(name: str) -> Any:
    return SETS[name]()


@pytest.mark.parametrize("name", SETS)
def test_tables_from_the_records_of_written_masks_are_the_numbers_of_the_public_code(name: str, tmp_path: Path) -> None:
    answered = _answered(name)
    records = [answered.record(video, tmp_path / video.video_id) for video in answered.videos] + answered.missing
    scores = in_scores(name, records)
    assert scores["name"] == name and scores["convention"] == next(iter(scores["tables"]))
    assert leaves(scores["tables"]) == pytest.approx(
        _wanted(name, answered), rel=0, abs=1e-4 if name == "refcoco" else 1e-5
    )


def test_every_protocol_is_held_here() -> None:
    assert set(_KNOWN.names()) == {*SETS}


@pytest.mark.parametrize("name", SETS)
def test_a_dataset_of_another_layout_is_refused_with_those_that_fit(name: str) -> None:
    data = {"source": "ref_youtube_vos", "root": "."}
    with pytest.raises(
        ConfigError, match=rf"^protocol is '{name}', which scores .*'ref_youtube_vos'; set protocol=null"
    ):
        EvaluateConfig.model_validate({"out": "o", "checkpoint": "c", "data": data, "protocol": name})


def test_an_unknown_protocol_is_one_line_with_the_nearest() -> None:
    settings = {"out": "o", "checkpoint": "c", "data": {"root": "."}, "protocol": "mevs"}
    with pytest.raises(ConfigError, match=r"^protocol is 'mevs'; known: [a-z0-9_, ]+\. Did you mean mevis\?$"):
        EvaluateConfig.model_validate(settings)


@pytest.mark.parametrize("name", SETS)
def test_a_video_without_masks_is_refused(name: str) -> None:
    video = HeldVideo("v", {}, {Expression("0", "x", (), "static"): np.zeros((1, 2, 2))})
    video.has_masks = False
    with pytest.raises(DataError, match=rf"^protocol is '{name}', which needs true masks; video v has none"):
        protocol_named(name).refuse_video(video, name=name)


@pytest.mark.parametrize("name", ["revos", "long_rvos"])
def test_a_sentence_of_no_known_kind_is_refused_where_kinds_are_reported_apart(name: str) -> None:
    video = HeldVideo("v", {}, {Expression("7", "x", ()): np.zeros((1, 2, 2))})
    with pytest.raises(DataError, match=rf"^protocol is '{name}', .*; video v: expression 7 is of kind ''"):
        protocol_named(name).refuse_video(video, name=name)


def test_the_confidence_of_a_mask_is_the_mean_probability_of_its_pixels_without_padding_frames() -> None:
    heard, expression = Confidences(), Expression("0", "x", ())
    logits = torch.tensor([[[2.0, -9.0], [4.0, -1.0]], [[-1.0, -2.0], [-3.0, -4.0]], [[8.0, 8.0], [8.0, 8.0]]])
    heard.hear(expression, logits, VaeClip(np.empty(0, np.uint8), 2, (2, 2), (2, 2), "half"))
    inside = 1 / (1 + np.exp(-np.array([2.0, 4.0])))
    assert heard.scores["0"] == pytest.approx([inside.mean(), 0.0])


def test_label_maps_that_are_written_are_those_of_the_public_code(tmp_path: Path) -> None:
    answered = _answered("ref_davis17")
    fused = json.loads((GOLDEN / "ref_davis17/expected.json").read_text())["fused"]
    for video in answered.videos:
        answered.record(video, tmp_path / video.video_id)
        for number in range(4):
            folder = tmp_path / video.video_id / "labels" / str(number)
            maps = np.stack([np.asarray(Image.open(folder / f"{name}.png")) for name in video.frame_names])
            wanted = fused[f"anno_{number}/{video.video_id}"]["sha256_uint8_thw"]
            assert hashlib.sha256(maps.astype(np.uint8).tobytes()).hexdigest() == wanted


def test_an_annotators_objects_share_out_the_pixels_of_their_masks(tmp_path: Path) -> None:
    """Logits of any size become label maps of the video's size: a label exactly where there is a mask."""
    sentences = [Expression(str(i), "x", (str(i // 4),)) for i in range(8)]
    video = HeldVideo("v", {}, dict.fromkeys(sentences, np.zeros((18, 10, 14))))
    heard, said = Competition(video, tmp_path), np.zeros((4, 2, 18, 10, 14), bool)
    clip = VaeClip(np.empty(0, np.uint8), 18, (7, 5), (14, 10), "half")
    torch.manual_seed(0)
    for i, expression in enumerate(sentences):
        logits = torch.randn(21, 5, 7)
        heard.hear(expression, logits, clip)
        said[i % 4, i // 4] = np.concatenate([masks for _, masks in masks_of(logits, clip)])
    assert np.array_equal(heard.labels > 0, said.any(axis=1))
    assert all(said[:, k][heard.labels == k + 1].all() for k in range(2))
    alone = said.sum(axis=1) == 1
    assert np.array_equal(heard.labels[alone], (said.argmax(axis=1) + 1)[alone])


@pytest.mark.parametrize(
    ("named", "frames", "message"),
    [
        ("1111222", 3, "7 expressions"),
        ("1112", 3, "expression 3 names 2; expected four in a row"),
        ("1111", 2, "2 frames"),
        ("11112222", 3, "object 2 is not in the first frame"),
    ],
)
def test_a_video_that_is_no_ref_davis17_is_refused_before_anything_is_sampled(
    named: str, frames: int, message: str
) -> None:
    shown = np.ones((frames, 2, 2))
    sentences = [Expression(str(i), "x", (anno_id,)) for i, anno_id in enumerate(named)]
    video = HeldVideo("v", {"1": shown, "2": 0 * shown}, dict.fromkeys(sentences, shown))
    with pytest.raises(DataError, match=message):
        protocol_named("ref_davis17").refuse_video(video, name="ref_davis17")
