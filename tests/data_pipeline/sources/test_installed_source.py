"""A dataset in a new layout is one file. An installed package names it in an entry point."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from film import SIZE, write_film
from golden_export import BOX, write_golden_export
from PIL import Image

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig, DataSourceConfig
from flowmask.data_pipeline.plan.leaks import family_of
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import ConfigError, DataError
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
LAYOUT, FILES = ((EXAMPLES / name).read_text() for name in ("own_dataset.py", "own_video_files.py"))


def install(site: Path, source: str, *, value: str = "seaside:BeachSource", package: str = "seaside") -> None:
    """Write the files that pip installs for a package of one file with one entry point."""
    site.mkdir(exist_ok=True)
    (site / f"{package}.py").write_text(source)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[flowmask.sources]\nbeach = {value}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for installed packages, still empty."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for module in ("seaside", "lakeside"):
        monkeypatch.delitem(__import__("sys").modules, module, raising=False)
    return tmp_path / "site"


@pytest.fixture
def beach(tmp_path: Path) -> Path:
    """Two videos of a training split and one of `valid`."""
    root = tmp_path / "data"
    for video, colour in (("sand", 90), ("waves", 30), ("dunes", 150)):
        (root / video).mkdir(parents=True)
        for i in range(5):
            picture, mask = np.full((32, 48, 3), colour, np.uint8), np.zeros((32, 48), np.uint8)
            picture[8:20, 4 * i : 4 * i + 12] = (220, 40, 60)
            mask[8:20, 4 * i : 4 * i + 12] = 255
            Image.fromarray(picture).save(root / video / f"{i:03d}.jpg")
            Image.fromarray(mask).save(root / video / f"{i:03d}.png")
    (root / "list.txt").write_text("train sand a red box\ntrain waves the box\nvalid dunes a red box\n")
    return root


def config_of(root: Path, out: Path, wan: Path) -> CacheBuildConfig:
    data = {"source": "beach", "root": root, "split": "train"}
    clip = {"frames": 5, "short_side": 32, "long_side": 64, "size_multiple": 16, "augment": False}
    parts = {"out": out, "model": {"wan": wan}, "data": data, "clip": clip, "cache": {"device": "cpu"}}
    return CacheBuildConfig.model_validate(parts)


def test_a_layout_of_video_files_from_outside_is_cached_with_sentences_that_name_nothing(
    site: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    install(site, FILES, value="seaside:PierSource")
    root = tmp_path / "data"
    (root / "clips").mkdir(parents=True)
    write_film(root / "clips" / "a.mp4", frames=7)
    mask = np.zeros(SIZE, np.uint8)
    mask[8:24, 8:40] = 255
    (root / "masks" / "a.mp4" / "boat").mkdir(parents=True)
    for number in range(7):
        Image.fromarray(mask).save(root / "masks" / "a.mp4" / "boat" / f"{number:05d}.png")
    (root / "train.csv").write_text("file,sentence,object\na.mp4,the boat,boat\na.mp4,a car,\n")
    config = config_of(root, tmp_path / "cache", tiny_wan)
    build(config)
    assert CacheReader(config.out).manifest.examples == 2 * 2, "two clips of 5 frames from 7, two sentences"
    (video,) = open_source(config.data).videos()
    boat, nothing = (video.mask(one.anno_ids, [0])[0] for one in video.expressions)
    assert boat.sum() == 16 * 32 and not nothing.any()


def test_a_layout_from_outside_is_cached_and_kept_from_leaks_by_its_name_alone(
    site: Path, beach: Path, tiny_wan: Path, tmp_path: Path
) -> None:
    install(site, LAYOUT)
    config = config_of(beach, tmp_path / "cache", tiny_wan)
    build(config)
    reader = CacheReader(config.out)
    assert {reader.record(i)["video_id"] for i in range(reader.manifest.examples)} == {"sand", "waves"}
    assert reader.manifest.leaks is not None and reader.manifest.leaks.checked == ["valid"]
    assert family_of(config.sources[0]) == "beach"
    (beach / "list.txt").write_text("train sand a red box\ntrain waves the box\nvalid waves the box\n")
    with pytest.raises(DataError, match=r"1 of 2 videos .* waves \(valid\)"):
        build(config_of(beach, tmp_path / "other", tiny_wan))


def test_a_layout_from_outside_is_evaluated_by_its_name(site: Path, beach: Path, tmp_path: Path) -> None:
    install(site, LAYOUT)
    torch.set_num_threads(1)
    config = {
        "out": tmp_path / "scores",
        "checkpoint": str(write_golden_export(tmp_path / "golden")),
        "data": {"source": "beach", "root": beach, "split": "valid"},
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
    }
    scores = evaluate(EvaluateConfig.model_validate(config))
    assert scores is not None and list(scores.per_expression) == ["dunes/0"]
    written = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert written["per_expression"].keys() == {"dunes/0"}


def test_an_unknown_name_lists_files_and_installed_layouts(site: Path, tmp_path: Path) -> None:
    install(site, LAYOUT)
    with pytest.raises(ConfigError) as raised:
        open_source(DataSourceConfig(source="bench", root=tmp_path))
    known = "a2d_sentences, beach, jhmdb_sentences, long_rvos, mevis, ref_davis17, ref_youtube_vos, refcoco, revos"
    assert str(raised.value) == f"data.source is 'bench'; known: {known}, synthetic, videos. Did you mean beach?"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_library", "cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"),
        ("1 +", "cannot be imported (SyntaxError"),
        ("x = 1", "cannot be imported (AttributeError"),
        ("class BeachSource: pass", "lacks the base Source"),
        (LAYOUT.replace("def split_ids", "def ids_of"), "lacks split_ids"),
    ],
)
def test_a_broken_layout_is_one_line_that_names_its_entry_point(
    site: Path, tmp_path: Path, source: str, said: str
) -> None:
    install(site, source)
    with pytest.raises(ConfigError) as raised:
        open_source(DataSourceConfig(source="beach", root=tmp_path))
    message = str(raised.value)
    assert said in message and "beach" in message and "seaside" in message and "\n" not in message


def test_two_packages_with_one_name_are_both_named(site: Path, tmp_path: Path) -> None:
    install(site, LAYOUT)
    install(site, LAYOUT, value="lakeside:BeachSource", package="lakeside")
    with pytest.raises(ConfigError, match=r"beach = .*side:BeachSource of .*side, beach = .*side; uninstall"):
        open_source(DataSourceConfig(source="beach", root=tmp_path))
