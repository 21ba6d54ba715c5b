"""The drawings beside the masks: run-length masks, figures, overlay videos with the film's sound."""

import json
from pathlib import Path

import numpy as np
import pytest
from claps import CLAPS, SIZE, heard, packets, seen, write_claps
from PIL import Image
from pycocotools import mask as coco

from flowmask.trainer.predict.input_video import InputVideo
from flowmask.trainer.predict.show.drawing import Drawing
from flowmask.trainer.predict.show.figure import FRAMES, FigureStrip, evenly
from flowmask.trainer.predict.show.overlay import colour, read_mask, write_mask

PROMPTS = ["the dog", "two birds near the water"]


def _masks(rng: np.random.Generator, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Empty, full, one pixel at each corner, noise, and boxes."""
    masks = [np.zeros(size, bool), np.ones(size, bool), rng.random(size) < 0.5]
    corner = np.zeros(size, bool)
    corner[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    masks.append(corner)
    while len(masks) < count:
        box = np.zeros(size, bool)
        (top, left), (high, wide) = rng.integers(0, size), rng.integers(1, size)
        box[top : top + high, left : left + wide] = True
        masks.append(box)
    return masks[:count]


def _draw(source: InputVideo, place: Path, *, figures: bool = False) -> list[Path]:
    """Draw random masks for the prompts; return their folders."""
    rng, folders = np.random.default_rng(len(source.frame_names)), [place / slug for slug in ("dog", "birds")]
    for folder in folders:
        folder.mkdir()
        for name, mask in zip(source.frame_names, _masks(rng, len(source.frame_names), source.size)):
            write_mask(folder / f"{name}.png", mask)
    drawing = Drawing(source, prompts=PROMPTS, folders=folders, earlier=[], figures=figures)
    told: list[int] = []
    assert drawing.draw(len(source.frame_names), on_frame=told.append) == ""
    assert told == list(range(1, len(source.frame_names) + 1))
    return folders


def _frames(folder: Path, count: int, size: tuple[int, int] = (37, 53)) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((*size, 3), 20 * number % 256, np.uint8)).save(folder / f"{number}.png")
    return folder


def test_run_length_masks_are_the_pngs_to_the_bit_as_pycocotools_reads_them(tmp_path: Path) -> None:
    source = InputVideo(_frames(tmp_path / "frames", 7))
    for folder in _draw(source, tmp_path):
        entries = json.loads(folder.with_suffix(".rle.json").read_text())
        masks = {entry["frame"]: coco.decode(entry) for entry in entries}
        assert list(masks) == source.frame_names
        assert all(type(entry["counts"]) is str and entry["size"] == [37, 53] for entry in entries)
        for name, mask in masks.items():
            assert (mask == read_mask(folder / f"{name}.png")).all()


def test_the_frames_of_a_figure_are_the_first_the_last_and_evenly_between() -> None:
    for total in range(1, 60):
        places = evenly(total)
        assert places == sorted(set(places)) and len(places) == min(total, FRAMES)
        assert places[0] == 0 and (places[-1] == total - 1 or total == 1)
        steps = np.diff(places)
        assert total == 1 or steps.max() - steps.min() <= 1


@pytest.mark.parametrize("size", [(37, 53), (90, 20), (16, 300), (720, 1280)])
def test_a_figure_shows_each_mask_in_its_colour_and_all_of_its_frames(size: tuple[int, int], tmp_path: Path) -> None:
    strip = FigureStrip("a sentence " * 30, colour(0), height=size[0], width=size[1])
    mask = np.zeros(size, bool)
    mask[size[0] // 4 : -(size[0] // 4), size[1] // 4 : -(size[1] // 4)] = True
    for number in range(FRAMES):
        strip.add(np.full((*size, 3), 40 * number, np.uint8), mask, f"{number}.0 s")
    strip.save(tmp_path / "f.png")
    picture = np.asarray(Image.open(tmp_path / "f.png"))
    solid = (picture == np.array(colour(0), np.uint8)).all(-1)
    inside = [(picture == np.uint8(40 * number)).all(-1).any() for number in range(1, FRAMES)]
    assert solid.sum() > 100 and all(inside)
    assert picture.shape[1] < 4000 and (picture[0] == 255).all() and (picture[-1] == 255).all()


def test_figures_are_drawn_only_if_asked_for(tmp_path: Path) -> None:
    source = InputVideo(_frames(tmp_path / "frames", 2))
    for asked in (False, True):
        (tmp_path / str(asked)).mkdir()
        folders = _draw(source, tmp_path / str(asked), figures=asked)
        assert [folder.with_suffix(".png").is_file() for folder in folders] == [asked, asked]


def test_every_overlay_has_the_sound_of_the_film_in_step(tmp_path: Path) -> None:
    write_claps(tmp_path / "clap.mp4", "aac", length_s=1.4)
    source = InputVideo(tmp_path / "clap.mp4", fps=5)
    assert source.size == SIZE
    folders = _draw(source, tmp_path)
    for path in [*(folder.with_suffix(".mp4") for folder in folders), tmp_path / "overlay.mp4"]:
        assert heard(path) == pytest.approx(CLAPS[:1], abs=0.03)
        assert len(packets(path)) > 50
    assert seen(tmp_path / "clap.mp4") == list(CLAPS[:1])
