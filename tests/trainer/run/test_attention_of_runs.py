"""A training, its validation and an evaluation in the same process each use the attention of their own config."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from attention_stand_in import stand_in
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from runs import GOLDEN, make_lab, run_config, start

from flowmask.models import dit as dits
from flowmask.models.config import SamplerConfig
from flowmask.models.dit import KERNELS
from flowmask.models.errors import CheckpointError, ConfigError
from flowmask.trainer.predict import inference
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.run import start as starting
from flowmask.trainer.score.evaluate import fingerprint_now
from flowmask.trainer.score.evaluate_config import EvaluateConfig

EVALUATE = {"evaluate.every_steps": 1, "evaluate.examples": 2, "evaluate.jf_examples": 1, "evaluate.timesteps": (500,)}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in other tests, but with heads of a width that all kernels accept."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(runs.DIT, "attention_head_dim", 16)
        make_lab(folder)
    return folder


def test_each_gets_the_kernels_that_it_asks_for(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (starting, inference):  # another test checks the support of this machine
        monkeypatch.setattr(module, "require_attention", lambda *args, **options: None)
    seen = {name: stand_in(name, monkeypatch) for name in KERNELS}
    changes = {"train.attention": "flash", "train.activation_checkpointing": "selective", "train.steps": 1}
    before = _AttentionBackendRegistry._active_backend
    start(lab, tmp_path / "run", changes | EVALUATE)
    calls = {name: len(each.shapes) for name, each in seen.items()}
    assert [name for name, count in calls.items() if count] == ["flash"]
    assert set(seen["flash"].learning) == {True, False}, "training, and its validation"
    for name in ("sage", "native"):
        for each in seen.values():
            each.shapes.clear()
        loaded = load_segmenter(str(tmp_path / "run"), sampler=SamplerConfig(), attention=name, device="cpu")
        list(loaded.logits(torch.zeros(1, 16, 2, 4, 8), ["a dog"]))
        assert [used for used, each in seen.items() if each.shapes] == [name]
    assert _AttentionBackendRegistry._active_backend is before


def test_a_resume_keeps_them(lab: Path, tmp_path: Path) -> None:
    start(lab, tmp_path, {"train.steps": 1})
    with pytest.raises(CheckpointError, match=r"train\.attention: native -> flash"):
        start(lab, tmp_path, {"train.steps": 2, "train.attention": "flash"})


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_machine_that_cannot_says_so_before_weights_are_read(
    lab: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dits, "build_dit", lambda *args, **options: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="attention is cudnn, which needs a GPU") as caught:
        if kind == "train":
            start(lab, tmp_path, {"train.attention": "cudnn"})
        else:
            load_segmenter(str(tmp_path), sampler=SamplerConfig(), attention="cudnn", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.attention": "sage"}, "Input should be 'native', 'cudnn' or 'flash'"),
        ({"train.attention": "flash3"}, "Input should be 'native', 'cudnn' or 'flash'"),
        ({"train.attention": "flash", "train.precision": "fp32"}, "set train.precision to bf16, or train.attention to"),
        ({"train.attention": "flash", "objective.kind": "mask_decoder"}, "has no blocks; set it to native"),
    ],
)
def test_a_training_that_cannot_use_them_is_refused_by_its_config(changes: Any, said: str, lab: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run_config(lab, lab / "run", changes)


def evaluation(**changes: Any) -> EvaluateConfig:
    data = {"root": GOLDEN, "split": "valid_u"}
    return EvaluateConfig.model_validate({"out": "o", "checkpoint": "none", "data": data} | changes)


def test_scores_keep_their_name_at_native_and_get_another_one_otherwise() -> None:
    def name(**changes: Any) -> str:
        return fingerprint_now(evaluation(**changes), weights={"dit": "w"}, wan_files="f")

    assert name() == name(attention="native") != name(attention="flash") != name(attention="sage")
    with pytest.raises(ValueError, match="precision is fp32; set precision to bf16, or attention to native"):
        evaluation(attention="sage", precision="fp32")
    with pytest.raises(ConfigError, match="precision is fp32; set precision to bf16, or attention to native"):
        load_segmenter("none", sampler=SamplerConfig(), attention="sage", precision="fp32", device="cpu")
