"""Whole runs on two caches, one of them of two datasets: trained, resumed, and refused when weights change."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from layouts import write_refcoco
from runs import cache_settings, losses, rows, start

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.models.errors import CheckpointError


@pytest.fixture(scope="module")
def mix(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lab's cache, and a cache of RefCOCO's images (one frame) and videos (five frames)."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "coco").mkdir()
    write_refcoco(folder / "coco")
    settings = cache_settings(lab) | {"out": folder / "second"}
    images = {"source": "refcoco", "root": folder / "coco", "split": "refcoco/train", "frames": 1}
    settings["data"] = [settings["data"], images]
    settings["cache"] = settings["cache"] | {"views": 1, "seed": 3}
    build(CacheBuildConfig.model_validate(settings))
    return [{"cache": str(lab / "cache"), "weight": 1}, {"cache": str(folder / "second"), "weight": 2}]


def test_a_run_on_two_caches_resumes_exactly_and_refuses_other_weights(
    lab: Path, mix: list[dict[str, Any]], tmp_path: Path
) -> None:
    overrides = {"data.cache": None, "data.mix": mix, "train.steps": 6}
    assert start(lab, tmp_path / "whole", overrides) == 0
    assert start(lab, tmp_path / "run", overrides | {"train.steps": 3, "train.schedule_steps": 6}) == 0
    assert start(lab, tmp_path / "run", overrides | {"train.schedule_steps": 6}) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [row["batch"] for row in rows(tmp_path / "run")] == [row["batch"] for row in rows(tmp_path / "whole")]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "(weight 1), " in log and "epochs of each cache at the last step: " in log
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    assert saved["cache"] is None and [entry["weight"] for entry in saved["mix"]] == [1.0, 2.0]
    same = [{**entry, "weight": 5 * entry["weight"]} for entry in mix]
    assert start(lab, tmp_path / "run", overrides | {"data.mix": same, "train.schedule_steps": 6}) == 0
    other = [mix[0] | {"weight": 3}, mix[1]]
    more = {"train.steps": 8, "train.schedule_steps": 6}
    with pytest.raises(CheckpointError, match=r"another cache: mix\.0\.share: 1/3 -> 3/5; mix\.1\.share"):
        start(lab, tmp_path / "run", overrides | more | {"data.mix": other})
    with pytest.raises(CheckpointError, match=r"another cache: .*mix"):
        start(lab, tmp_path / "run", more | {"data.mix": ()})
