"""Trying settings: the J&F of an evaluation with them, each combination once, and no work done twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_export import BOX, DATA, write_published

from flowmask.models.errors import ConfigError
from flowmask.models.segment import Segmenter
from flowmask.trainer.score import try_settings as trying
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.try_settings import TRIED, Tried, try_settings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")
    write_published(folder)
    return folder


def config(files: Path, out: Path, **changes: Any) -> EvaluateConfig:
    tree = {
        "out": out,
        "checkpoint": str(files / "dit.pth"),
        "mask_decoder": str(files / "decoder.pth"),
        "model": {"wan": files / "wan"},
        "data": {"source": "mevis", "root": DATA, "split": "valid_u"},
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
    }
    return EvaluateConfig.model_validate(tree | changes)


def test_each_combination_has_the_scores_of_its_evaluation_and_asks_for_no_more_than_it_must(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, sampled = [], []
    encode, sample = Segmenter.encode_video, trying.sample_mask
    monkeypatch.setattr(Segmenter, "encode_video", lambda self, signed: (encoded.append(1), encode(self, signed))[1])
    monkeypatch.setattr(trying, "sample_mask", lambda *args, **more: (sampled.append(1), sample(*args, **more))[1])
    tried = try_settings(config(files, tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert len(tried) == 16 and len({tuple(one.conventions.items()) for one in tried}) == 16
    assert [one.scores["jf"] for one in tried] == sorted((one.scores["jf"] for one in tried), reverse=True)
    assert len(encoded) == 2 * 2 and len(sampled) <= 8 * len(encoded)
    for one in (tried[0], tried[7], tried[-1]):
        scores = evaluate(config(files, tmp_path / f"{tried.index(one)}", conventions=one.conventions, max_videos=4))
        assert scores is not None
        assert {name: scores.totals[name] for name in ("j", "f", "jf")} == {n: one.scores[n] for n in ("j", "f", "jf")}


def test_what_is_known_or_asked_for_is_not_tried(files: Path, tmp_path: Path) -> None:
    def of(**changes: Any) -> list[Tried]:
        return try_settings(config(files, tmp_path / "none", max_videos=1, **changes))

    asked = {"pixel_norm": "imagenet", "text_tokens": 64, "lowercase": False}
    tried = of(conventions=asked)
    assert {one.conventions["mask_latent_norm"] for one in tried} == {"none", "video"} and len(tried) == 2
    assert all(one.conventions[name] == value for one in tried for name, value in asked.items())
    tried = of(checkpoint=str(files / "export"))  # holds text_tokens and lowercase
    assert len(tried) == 4 and {one.conventions["lowercase"] for one in tried} == {False}
    with pytest.raises(ConfigError, match="nothing to try") as raised:
        of(conventions={name: values[0] for name, values in TRIED.items()})
    assert "\n" not in str(raised.value)
