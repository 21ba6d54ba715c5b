"""A light mask decoder is used by name like the VAE's, from any file that holds it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import GOLDEN, start
from safetensors.torch import save_file

from flowmask.models.config import SamplerConfig
from flowmask.models.decoders.light import LightMaskDecoder
from flowmask.models.errors import WeightsError
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.predict import predict
from flowmask.trainer.predict.weights import load_mask_decoder, part_of
from flowmask.trainer.predict.windows.cut import WindowConfig
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig

SMALL = {"objective.kind": "light_mask_decoder", "objective.network": {"width": 8, "depth": 1}}


@pytest.fixture(scope="module")
def light(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("light") / "run"
    assert start(lab, out, SMALL | {"train.steps": 2, "train.lr": 1e-2}) == 0
    return out


@pytest.fixture(scope="module")
def dit(lab: Path, light: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT whose config names the light decoder, also for its validation."""
    out = tmp_path_factory.mktemp("dit") / "run"
    watched = {"evaluate.every_steps": 2, "evaluate.examples": 1, "evaluate.jf_examples": 1, "evaluate.overlays": 0}
    assert start(lab, out, watched | {"train.steps": 2, "model.mask_decoder": str(light)}) == 0
    return out


def loaded(source: Path, lab: Path, **more: Any) -> LoadedSegmenter:
    settings = {"sampler": SamplerConfig(), "wan": lab / "wan", "precision": "fp32", "device": "cpu", **more}
    found = load_segmenter(str(source), **settings)
    assert isinstance(found.segmenter.mask_decoder, LightMaskDecoder)
    return found


def test_whatever_holds_its_weights_gives_the_same_logits(lab: Path, light: Path, dit: Path, tmp_path: Path) -> None:
    trained = load_mask_decoder(str(light))
    save_file(trained.state_dict, tmp_path / "bare.safetensors")
    torch.save(trained.state_dict, tmp_path / "bare.pth")
    folder = export(str(light), format="diffusers", out=tmp_path / "folder").path
    file = export(str(folder), format="safetensors", out=tmp_path / "file.safetensors").path
    assert part_of(str(folder)).name == part_of(str(file)).name == "mask_decoder"
    assert json.loads((folder / "flowmask.json").read_text())["light_decoder"] == {"width": 8, "depth": 1}
    masks = np.random.default_rng(0).random((5, 32, 64)) > 0.5
    named = loaded(dit, lab)
    expected = named.round_trip(masks)
    for source in (light, folder, file, tmp_path / "bare.safetensors", tmp_path / "bare.pth"):
        found = loaded(dit, lab, mask_decoder=str(source))
        assert found.weights == named.weights == named.weights | {"mask_decoder": trained.sha256}
        assert torch.equal(found.round_trip(masks), expected)


def test_an_exported_dit_brings_it_along(lab: Path, dit: Path, light: Path, tmp_path: Path) -> None:
    folder = export(str(dit), format="diffusers", out=tmp_path / "export").path
    assert loaded(folder, lab).weights == loaded(dit, lab).weights
    assert json.loads((folder / "flowmask.json").read_text())["light_decoder"] == {"width": 8, "depth": 1}
    alone = export(str(folder), format="safetensors", out=tmp_path / "dit.safetensors").path
    assert "mask_decoder" not in loaded(alone, lab, mask_decoder=str(folder)).conventions


def test_flowrvs_has_no_place_for_it(light: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no place for a light mask decoder; use diffusers or safetensors"):
        export(str(light), format="flowrvs", out=tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_it_is_no_checkpoint(light: Path, lab: Path) -> None:
    with pytest.raises(WeightsError, match="trained light_mask_decoder, but weights of dit are needed"):
        load_segmenter(str(light), sampler=SamplerConfig(), wan=lab / "wan")


def test_it_validates_scores_and_predicts_in_windows(dit: Path, light: Path, lab: Path, tmp_path: Path) -> None:
    assert "eval_jf" in json.loads((dit / "evaluations.jsonl").read_text())
    data = {"source": "mevis", "root": str(GOLDEN), "split": "valid_u"}
    config = {"checkpoint": str(dit), "data": data, "device": "cpu", "decoder_score": True, "max_videos": 1}
    scores = evaluate(EvaluateConfig.model_validate({**config, "out": str(tmp_path / "e")}))
    assert scores is not None and scores.decoder is not None and scores.decoder["jf"] >= 0
    assert scores.weights["mask_decoder"] == load_mask_decoder(str(light)).sha256
    frames = next((GOLDEN / "valid_u" / "JPEGImages").iterdir())
    window = WindowConfig(frames=5, overlap=0)
    done = predict(frames, ["a thing"], checkpoint=str(dit), out=tmp_path / "p", device="cpu", window=window)
    assert len(list(done.prompts[0].masks.iterdir())) == len(list(frames.iterdir()))
