"""Small inputs that the tests of the pipeline share: a dataset in MeViS layout, a tiny Wan folder, a finished cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.formats import rle
from flowmask.models.weights.tiny_wan import write_tiny_wan

SIZE = (48, 64)  # height, width in px
LENGTHS = {"birds": 7, "cars": 12, "dogs": 5}
LONG = "the one " * 40 + "that moves left"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_mevis(folder: Path) -> None:
    """Three videos with a moving square and a disc that leaves; birds' last sentence is of the disc alone."""
    generator = np.random.default_rng(0)
    videos, masks, anno = {}, {}, 0
    for video_id, length in LENGTHS.items():
        frames = folder / "JPEGImages" / video_id
        frames.mkdir(parents=True)
        names = [f"{5 * i:05d}" for i in range(length)]
        background = generator.integers(0, 255, 3)
        square, disc = [], []
        for i, name in enumerate(names):
            picture = np.tile(background.astype(np.uint8), (*SIZE, 1))
            at_square = np.zeros(SIZE, bool)
            at_square[10:30, 4 * i : 4 * i + 16] = True
            rows, columns = np.indices(SIZE)
            at_disc = (rows - 34) ** 2 + (columns - 60 - 6 * i) ** 2 < 80
            picture[at_square], picture[at_disc] = (200, 30, 40), (20, 60, 220)
            Image.fromarray(picture).save(frames / f"{name}.jpg", quality=95)
            square.append(rle.encode(at_square))
            disc.append(rle.encode(at_disc) if at_disc.any() else None)
        masks |= {str(anno): square, str(anno + 1): disc}
        texts = [
            ("The red  Square on the left", [anno]),
            (f"the bright blue disc of {video_id}", [anno + 1]),
            ("everything that moves", [anno, anno + 1]),
            ("the moving square" if video_id != "cars" else LONG, [anno]),
        ]
        expressions = {str(i): {"exp": t, "obj_id": [0], "anno_id": a} for i, (t, a) in enumerate(texts)}
        videos[video_id] = {"vid_id": anno, "frames": names, "expressions": expressions}
        anno += 2
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (folder / "mask_dict.json").write_text(json.dumps(masks))


@pytest.fixture(scope="session")
def mevis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a dataset with one split, `train`; never changed by a test."""
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
    """A finished cache of two views; never changed by a test."""
    out = tmp_path_factory.mktemp("built") / "cache"
    build(make_config(out))
    return out
