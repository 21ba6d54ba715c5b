"""Small inputs for all tests of the pipeline: a dataset in MeViS layout, a tiny Wan folder, a finished cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import write_mevis

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.models.weights.tiny_wan import write_tiny_wan


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mevis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a dataset with one split, `train`; no test changes it."""
    root = tmp_path_factory.mktemp("mevis")
    write_mevis(root / "train")
    return root


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "wan"
    write_tiny_wan(folder, random_vae=True)
    return folder


MakeConfig = Callable[..., CacheBuildConfig]


@pytest.fixture(scope="session")
def make_config(mevis: Path, tiny_wan: Path) -> MakeConfig:
    """A small build config; keyword arguments `clip`, `cache`, `root`, `wan` change parts of it."""

    def make(
        out: Path, *, clip: Any = None, cache: Any = None, root: Path = mevis, wan: Path = tiny_wan
    ) -> CacheBuildConfig:
        small = {"frames": 5, "short_side": 32, "long_side": 64, "size_multiple": 16}
        crop = {"crop_short_sides": [48], "crop_min": 32, "crop_max": 64}
        return CacheBuildConfig.model_validate(
            {
                "out": out,
                "model": {"wan": wan},
                "data": {"source": "mevis", "root": root, "split": "train"},
                "clip": {**small, **crop, **(clip or {})},
                "cache": {"clips_per_shard": 2, "views": 2, "device": "cpu", **(cache or {})},
            }
        )

    return make


@pytest.fixture(scope="session")
def cache(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two views; no test changes it."""
    out = tmp_path_factory.mktemp("built") / "cache"
    build(make_config(out))
    return out
