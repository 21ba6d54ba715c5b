"""The synthetic dataset: what it says is true, what it stores is what it shows, and a seed decides it all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowmask.data_pipeline.formats.rle import decode
from flowmask.data_pipeline.sources.synthetic import write_synthetic
from flowmask.data_pipeline.sources.synthetic_scene import BLOCK, COLOURS, SHAPES, draw_block
from flowmask.models.errors import DataError

SIDE, FRAMES, VIDEOS = 64, 5, 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    write_synthetic(folder, split="train", videos=VIDEOS, seed=3, frames=FRAMES, size=SIDE)
    return folder


def load(root: Path, split: str = "train") -> tuple[dict, dict]:
    folder = root / split
    meta = json.loads((folder / "meta_expressions.json").read_text())["videos"]
    return meta, json.loads((folder / "mask_dict.json").read_text())


def union(masks: dict, anno_ids: list[int], size: int = SIDE) -> np.ndarray:
    each = [[decode(rle, size=(size, size), where="test") for rle in masks[str(a)]] for a in anno_ids]
    return np.any(each, axis=0)


def test_every_video_has_its_frames_and_every_sentence_its_masks(root: Path) -> None:
    meta, masks = load(root)
    assert len(meta) == VIDEOS
    for video, entry in meta.items():
        assert len(entry["frames"]) == FRAMES
        for frame in entry["frames"]:
            with Image.open(root / "train" / "JPEGImages" / video / f"{frame}.jpg") as image:
                assert image.size == (SIDE, SIDE)
        for expression in entry["expressions"].values():
            assert expression["exp"] and len(expression["anno_id"]) == len(expression["obj_id"])
            assert union(masks, expression["anno_id"]).any()


def test_a_named_colour_is_the_colour_under_the_mask(root: Path) -> None:
    meta, masks = load(root)
    palette = np.array(list(COLOURS.values()), float)
    checked = 0
    for video, entry in meta.items():
        image = np.asarray(Image.open(root / "train" / "JPEGImages" / video / f"{entry['frames'][0]}.jpg"), float)
        for expression in entry["expressions"].values():
            named = [colour for colour in COLOURS if colour in expression["exp"].split()]
            mask = union(masks, expression["anno_id"])[0]
            if named and mask.sum() > 60:
                seen = np.linalg.norm(palette - np.median(image[mask], axis=0), axis=1).argmin()
                assert named == [list(COLOURS)[seen]]
                checked += 1
    assert checked > 20


def test_a_named_direction_is_where_the_mask_goes() -> None:
    steps = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    block = draw_block(5, 0, frames=FRAMES, size=SIDE)
    grid = np.arange(SIDE)
    checked = 0
    for scene, sentences in enumerate(block.sentences):
        for text, objects in sentences:
            way = next((steps[word] for word in text.split() if word in steps), None)
            still = text.endswith(("still", "not moving"))
            for k in objects if way or still else ():
                mask = block.masks[scene, k]
                at_edge = mask[:, 0].any() or mask[:, -1].any() or mask[:, :, 0].any() or mask[:, :, -1].any()
                others = np.delete(block.masks[scene], k, axis=0).any(0)
                grown = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
                ring = grown[:, 2:, 1:-1] | grown[:, :-2, 1:-1] | grown[:, 1:-1, 2:] | grown[:, 1:-1, :-2]
                if at_edge or (ring & others).any():
                    continue
                x, y = mask.sum(1) @ grid / mask.sum((1, 2)), mask.sum(2) @ grid / mask.sum((1, 2))
                moved = np.array([x[-1] - x[0], y[-1] - y[0]])
                assert np.abs(moved).max() < 0.5 if still else moved @ way > 0.1 * SIDE
                checked += 1
    assert checked > 100


def test_a_sentence_is_true_of_all_its_objects_and_of_no_other() -> None:
    """Two sentences of a video with the same words name the same objects, and more words never name more."""
    for drawn in draw_block(6, 0, frames=FRAMES, size=SIDE).sentences:
        scene = [(text.replace("not moving", "still"), objects) for text, objects in drawn]
        assert len(scene) >= 2
        for text, objects in scene:
            words = {w.rstrip("s") for w in text.split()} & {*COLOURS, *SHAPES, "left", "right", "up", "down", "still"}
            plural = text.split()[1 + any(c in text for c in COLOURS)].endswith("s")
            assert plural == (len(objects) > 1)
            for other, named in scene:
                other_words = {w.rstrip("s") for w in other.split()}
                if words and words < other_words:
                    assert set(named) <= set(objects)


def test_most_sentences_have_another_of_the_same_video_about_other_objects() -> None:
    scenes = draw_block(7, 1, frames=FRAMES, size=SIDE).sentences
    alone = [all(set(a) & set(b) for _, b in scene) for scene in scenes for _, a in scene]
    assert np.mean(alone) < 0.1


def test_some_sentences_name_several_objects_and_some_objects_leave() -> None:
    block = draw_block(8, 0, frames=FRAMES, size=SIDE)
    sets = {(scene, objects) for scene, group in enumerate(block.sentences) for _, objects in group}
    assert 0.05 < np.mean([len(objects) > 1 for _, objects in sets]) < 0.5
    gone = [not block.masks[s, list(o), -1].any() for s, o in sets if len(o) == 1]
    assert 0.005 < np.mean(gone) < 0.15


def test_the_same_seed_writes_the_same_bytes_and_another_split_other_scenes(root: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path, split="train", videos=3, seed=3, frames=FRAMES, size=SIDE)
    write_synthetic(tmp_path, split="valid_u", videos=3, seed=3, frames=FRAMES, size=SIDE)
    again = sorted((tmp_path / "train" / "JPEGImages").rglob("*.jpg"))
    assert len(again) == 3 * FRAMES
    for path in again:
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes()
    meta, masks = load(tmp_path)
    whole_meta, whole_masks = load(root)
    assert meta.items() <= whole_meta.items() and masks.items() <= whole_masks.items()
    other = sorted((tmp_path / "valid_u" / "JPEGImages").rglob("*.jpg"))
    assert {p.read_bytes() for p in again}.isdisjoint({p.read_bytes() for p in other})


def test_other_sizes_and_lengths_are_drawn_as_asked(tmp_path: Path) -> None:
    write_synthetic(tmp_path, split="train", videos=2, seed=0, frames=9, size=96)
    meta, masks = load(tmp_path)
    assert all(len(entry["frames"]) == 9 for entry in meta.values())
    assert all(union(masks, [int(a)], 96).shape == (9, 96, 96) for a in masks)
    assert draw_block(0, 0, frames=1, size=32).frames.shape == (BLOCK, 1, 32, 32, 3)


def test_an_existing_split_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="exists"):
        write_synthetic(root, split="train", videos=1, seed=0)
