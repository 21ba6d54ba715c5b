"""A user's mistake is one line that names it, an exit code that is not 0, and no loss."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowmask.launch import dispatch, jobs
from flowmask.launch.cli import main as cli
from flowmask.models.errors import UserError

DATASET = Path(__file__).parents[2] / "golden" / "parity" / "e2e" / "data"
META = "data/valid_u/meta_expressions.json"
SMALL = [
    "clip.sampling=whole",
    "clip.short_side=32",
    "clip.long_side=32",
    "clip.size_multiple=16",
    "clip.augment=false",
]

Mutation = Callable[[Path], None]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    folder = tmp_path_factory.mktemp("weights") / "wan"
    write_tiny_wan(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, wan: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset, weights and a cache config; jobs run in this process, as their only rank."""
    shutil.copytree(DATASET, tmp_path / "data")
    (tmp_path / "wan").symlink_to(wan)
    (tmp_path / "cache.yaml").write_text(
        "out: cache\nmodel: {wan: wan}\ndata: {source: mevis, root: data, split: valid_u}\n"
    )
    (tmp_path / "train.yaml").write_text(
        "out: run\nmodel: {wan: wan}\ndata: {cache: cache}\ntrain: {steps: 2, global_batch: 2}\n"
    )
    (tmp_path / "evaluate.yaml").write_text("out: scores\ncheckpoint: run\ndata: {root: data, split: valid_u}\n")
    (tmp_path / "occupied").write_text("a file where a folder is wanted")
    monkeypatch.chdir(tmp_path)

    def run_here(kind: str, resolved: dict[str, Any], *, processes: int) -> int:
        if kind != "train":  # a training would look for its group
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", "1")
        return jobs.run_rank(kind, resolved)

    monkeypatch.setattr(dispatch, "run_local", run_here)
    return tmp_path


def refusal(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command, which must refuse; return its one line."""
    monkeypatch.setattr(sys, "argv", ["flowmask", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code not in (0, None)
    lines = [line for line in said.err.splitlines() if line.startswith("flowmask: ")]
    assert len(lines) == 1 and "Traceback" not in said.err + said.out, said.err
    return lines[0]


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def expressions(place: Path, change: Callable[[dict], object]) -> None:
    edit_json(place / META, lambda meta: change(meta["videos"]))


def first_frame(place: Path) -> Path:
    return sorted((place / "data" / "valid_u" / "JPEGImages" / "vidA").iterdir())[0]


def wrong_size(place: Path) -> None:
    def change(masks: dict) -> None:
        rles = next(iter(masks.values()))
        rle = next(rle for rle in rles if rle)
        rle["size"] = [rle["size"][0] + 1, rle["size"][1]]

    edit_json(place / "data" / "valid_u" / "mask_dict.json", change)


def cut_video(place: Path) -> None:
    """A video file, cut short."""
    from flowmask.trainer.predict.show.overlay import OverlayVideo

    with OverlayVideo(place / "clip.mp4", prompts=[], height=64, width=64, fps=5) as video:
        import numpy as np

        for number in range(40):
            video.add(np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8), [])
    whole = (place / "clip.mp4").read_bytes()
    (place / "clip.mp4").write_bytes(whole[: len(whole) // 2])


BUILD = ["cache", "build", "cache.yaml", *SMALL]
CASES: dict[str, tuple[Mutation, list[str], list[str]]] = {
    "missing dataset": (lambda p: shutil.rmtree(p / "data"), BUILD, ["data"]),
    "missing split": (lambda p: None, [*BUILD, "data.split=train"], ["train"]),
    "missing weights": (lambda p: (p / "wan").unlink(), BUILD, ["wan is not a folder", "tiny-wan"]),
    "misspelt key": (lambda p: None, [*BUILD, "cache.veiws=3"], ["did you mean cache.views"]),
    "unknown source": (lambda p: None, [*BUILD, "data.source=mewis"], ["mewis", "mevis"]),
    "frame that is no image": (lambda p: first_frame(p).write_text("no image"), BUILD, ["00000.jpg"]),
    "truncated frame": (
        lambda p: first_frame(p).write_bytes(first_frame(p).read_bytes()[:700]), BUILD, ["00000.jpg"],
    ),
    "missing frame": (lambda p: first_frame(p).unlink(), BUILD, ["00000.jpg"]),
    "RLE of another size": (wrong_size, BUILD, ["size", "mask_dict.json"]),
    "sentence of no length": (
        lambda p: expressions(p, lambda v: v["vidA"]["expressions"]["0"].update(exp=" ")), BUILD, ["vidA", "0"],
    ),
    "empty dataset": (lambda p: expressions(p, lambda v: v.clear()), BUILD, ["meta_expressions.json"]),
    "broken JSON": (
        lambda p: (p / META).write_text('{"videos": '), BUILD, ["meta_expressions.json"],
    ),
    "truncated video": (
        cut_video, ["predict", "clip.mp4", "a dog", "--checkpoint", "data"], ["clip.mp4"],
    ),
    "unwritable cache": (lambda p: None, [*BUILD, "out=occupied/cache"], ["occupied"]),
    "train without a cache": (lambda p: None, ["train", "train.yaml"], ["cache", "flowmask cache build"]),
    "train with a misspelt key": (lambda p: None, ["train", "train.yaml", "train.lrr=1"], ["train.lrr", "train.lr"]),
    "evaluate without a run": (lambda p: None, ["evaluate", "evaluate.yaml"], ["run"]),
    "verify no cache": (lambda p: None, ["cache", "verify", "data"], ["data", "manifest.json"]),
    "predict a missing video": (
        lambda p: None, ["predict", "nothing.mp4", "a dog", "--checkpoint", "data"], ["nothing.mp4"],
    ),
    "predict without weights": (
        lambda p: None, ["predict", "data", "a dog", "--checkpoint", "run"], ["--checkpoint run does not exist"],
    ),
    "predict a text file": (
        lambda p: None, ["predict", "occupied", "a dog", "--checkpoint", "data"], ["occupied"],
    ),
    "predict an empty sentence": (
        lambda p: None, ["predict", "data/valid_u/JPEGImages/vidA", " ", "--checkpoint", "data"], ["sentence"],
    ),
    "tiny-wan onto a file": (lambda p: None, ["tiny-wan", "occupied"], ["occupied"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_that_names_it(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, words, named = CASES[name]
    mutate(place)
    line = refusal(*words, capsys=capsys, monkeypatch=monkeypatch)
    assert any(word in line for word in named), line
    assert (place / "occupied").read_text() == "a file where a folder is wanted"


def test_a_build_that_met_a_bad_frame_goes_on_once_it_is_mended(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = first_frame(place)
    good = frame.read_bytes()
    frame.write_text("no image")
    refusal(*BUILD, capsys=capsys, monkeypatch=monkeypatch)
    frame.write_bytes(good)
    monkeypatch.setattr(sys, "argv", ["flowmask", *BUILD])
    try:
        cli.main()
    except SystemExit as ended:
        assert ended.code in (0, None), capsys.readouterr().err
    assert (place / "cache" / "manifest.json").is_file()


def test_a_cache_of_other_settings_is_refused_with_the_field_and_stays_as_it_was(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.start("cache", place / "cache.yaml", SMALL)
    before = {path: path.read_bytes() for path in (place / "cache").rglob("*") if path.is_file()}
    line = refusal(*BUILD, "cache.seed=7", capsys=capsys, monkeypatch=monkeypatch)
    assert "cache.seed" in line
    assert {path: path.read_bytes() for path in (place / "cache").rglob("*") if path.is_file()} == before


def test_a_shard_cut_in_half_stops_training_with_its_name(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.start("cache", place / "cache.yaml", SMALL)
    shard = sorted((place / "cache" / "shards").glob("*.tar"))[0]
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=shard.name):
        from flowmask.data_pipeline.read.reader import CacheReader

        CacheReader(place / "cache").close()
