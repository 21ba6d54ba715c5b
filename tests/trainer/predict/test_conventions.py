"""Conventions that a weights file lacks are asked for or assumed, with a message; those that it holds always count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_export import BOX, DATA, write_published

from flowmask.models.config import AskedConventions, SamplerConfig
from flowmask.models.errors import ConfigError
from flowmask.trainer.predict.conventions import PUBLISHED, segment_settings, settle, unlike_unasked
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.score.evaluate import fingerprint_now
from flowmask.trainer.score.evaluate_config import EvaluateConfig

OTHER: dict[str, Any] = {"pixel_norm": "imagenet", "text_tokens": 64, "mask_latent_norm": "video", "lowercase": False}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_published(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def untold(export: Path) -> Path:
    """The same weights as a published file, which holds none of its conventions."""
    return export.parent / "dit.pth"


def test_what_is_assumed_is_what_a_run_takes_that_says_nothing_else() -> None:
    assert PUBLISHED.keys() == OTHER.keys() == AskedConventions.model_fields.keys()
    assert PUBLISHED == {"pixel_norm": "half", "text_tokens": 256, "mask_latent_norm": "none", "lowercase": True}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("told", [None, "published", "other"])
@pytest.mark.parametrize("asked", [None, "published", "other"])
def test_what_is_remembered_counts_then_what_is_asked_for_then_what_is_assumed(
    name: str, told: str | None, asked: str | None
) -> None:
    values = {"published": PUBLISHED[name], "other": OTHER[name]}
    known = {name: values[told]} if told else {}
    wanted = AskedConventions.model_validate({name: values[asked]} if asked else {})
    if told and asked and told != asked:
        with pytest.raises(
            ConfigError, match=f"it.pth records.*{name} .* is asked for, but .* remove this setting"
        ) as raised:
            settle(known, wanted, where="it.pth")
        assert "\n" not in str(raised.value)
        return
    found = settle(known, wanted, where="it.pth")
    assert found.settings == {**PUBLISHED, name: values[told or asked or "published"]}
    assert found.assumed.keys() == PUBLISHED.keys() - ({name} if told or asked else set())
    assert all(f"{key} " in found.said() for key in found.assumed) and "\n" not in found.said()
    assert unlike_unasked(known, wanted) == ({name: OTHER[name]} if asked == "other" and not told else {})


def test_nothing_is_said_where_all_is_known() -> None:
    assert settle(OTHER, AskedConventions(), where="it").said() == ""
    assert settle({}, AskedConventions.model_validate(OTHER), where="it").said() == ""


def test_weights_segment_by_what_is_asked_for_and_one_line_says_what_is_assumed(export: Path, untold: Path) -> None:
    def load(**asked: Any) -> tuple[Any, list[str]]:
        said: list[str] = []
        loaded = load_segmenter(
            str(untold),
            wan=export.parent / "wan",
            ema=False,
            sampler=SamplerConfig(),
            encoder_precision="fp32",
            device="cpu",
            conventions=AskedConventions.model_validate(asked),
            say=said.append,
        )
        return loaded, said

    loaded, said = load(**OTHER)
    assert loaded.pixel_norm == "imagenet" and not said
    assert loaded.segmenter.settings == segment_settings(OTHER, sampler=SamplerConfig())
    loaded, said = load(text_tokens=64)
    assert len(said) == 1 and said[0].startswith(f"{untold}: ") and "text_tokens" not in said[0]
    assert loaded.segmenter.settings == segment_settings({"text_tokens": 64}, sampler=SamplerConfig())


def test_an_evaluation_is_named_by_the_conventions_that_asking_changes(export: Path, untold: Path) -> None:
    def name(checkpoint: Path, **asked: Any) -> str:
        data = {"source": "mevis", "root": DATA, "split": "valid_u"}
        tree = {"out": "o", "checkpoint": str(checkpoint), "data": data, "box": BOX, "conventions": asked}
        return fingerprint_now(EvaluateConfig.model_validate(tree), weights={"dit": "w"}, wan_files="f")

    assert name(untold) == name(untold, **PUBLISHED)
    assert len({name(untold), *(name(untold, **{key: value}) for key, value in OTHER.items())}) == 5
    assert name(export) == name(export, lowercase=False) != name(export, pixel_norm="imagenet")
