"""The synthetic dataset: its sentences are true, its masks match its pictures, and the seed decides all."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trials import SEED, TRIALS

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats.rle import decode
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources import open_source
from flowmask.data_pipeline.sources.base import names_nothing
from flowmask.data_pipeline.sources.synthetic import write_synthetic
from flowmask.data_pipeline.sources.synthetic_scene import (
    BLOCK,
    COLOURS,
    MOTIONS,
    NO_SUCH_COLOUR,
    OTHER_MOTION,
    SHAPES,
    _draw_objects,
    draw_block,
)
from flowmask.models.errors import DataError

SIDE, FRAMES, VIDEOS = 64, 5, 40
SENTENCES = "e1293f2ed3f6dfff"  # SHA-256 of the sentences of `root` before some could name nothing


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
    """In one video, equal words name the same objects, and more words never name more objects."""
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


def words_of(text: str) -> dict[str, str]:
    """The word of a sentence for each trait that it mentions."""
    said = [word.removesuffix("s") for word in text.replace("not moving", "still").split()]
    traits = {"colour": COLOURS, "shape": SHAPES, "motion": MOTIONS}
    return {trait: word for trait, known in traits.items() for word in said if word in known}


def objects_of(seed: int, block: int) -> list[list[dict[str, str]]]:
    """Traits of the objects of each scene of a block."""
    drawn = _draw_objects(np.random.default_rng(mix64(seed, block)), FRAMES, SIDE)
    return [
        [
            {
                "colour": list(COLOURS)[drawn.colour[scene, k]],
                "shape": SHAPES[drawn.shape[scene, k]],
                "motion": MOTIONS[drawn.motion[scene, k]],
            }
            for k in range(drawn.count[scene])
        ]
        for scene in range(BLOCK)
    ]


def test_words_are_true_of_the_objects_that_a_sentence_names_and_of_none_if_it_names_nothing() -> None:
    seed = 9 + SEED
    for number in range(2 * TRIALS):
        block, scenes = draw_block(seed, number, frames=FRAMES, size=SIDE, no_target=6), objects_of(seed, number)
        for scene, sentences, nothing in zip(scenes, block.sentences, block.nothing, strict=True):
            for text, objects in (*sentences, *((text, ()) for text, _ in nothing)):
                fits = [k for k, traits in enumerate(scene) if words_of(text).items() <= traits.items()]
                assert fits == list(objects), text
            for text, kind in nothing:
                said = words_of(text)
                of_colour = [traits for traits in scene if traits["colour"] == said["colour"]]
                assert bool(of_colour) == (kind == OTHER_MOTION)
                if kind == OTHER_MOTION:  # only the motion is wrong
                    assert any(traits | said == traits | {"motion": said["motion"]} for traits in of_colour)


@pytest.mark.parametrize("no_target", [1, 2, 3, 4])
def test_every_video_has_as_many_sentences_of_each_kind_that_name_nothing_as_the_number_allows(no_target: int) -> None:
    kinds = [
        [kind for _, kind in nothing] for nothing in draw_block(2, 0, frames=1, size=16, no_target=no_target).nothing
    ]
    for found in kinds:
        assert len(found) == no_target
        assert abs(found.count(NO_SUCH_COLOUR) - found.count(OTHER_MOTION)) == no_target % 2
    assert sum(found.count(OTHER_MOTION) for found in kinds) == BLOCK * no_target / 2


def test_sentences_that_name_nothing_change_nothing_else(root: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path, split="train", videos=VIDEOS, seed=3, frames=FRAMES, size=SIDE, no_target=2)
    for path in (root / "train").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / path.relative_to(root)).read_bytes()
    (meta, masks), (before, masks_before) = load(tmp_path), load(root)
    assert masks == masks_before
    for video, entry in meta.items():
        told = before[video]["expressions"]
        assert entry["expressions"].items() > told.items()
        more = [entry["expressions"][exp_id] for exp_id in entry["expressions"].keys() - told.keys()]
        assert len(more) == 2 and all(e["anno_id"] == e["obj_id"] == [] for e in more)


def test_a_dataset_without_sentences_that_name_nothing_says_what_it_always_said(root: Path) -> None:
    meta = (root / "train" / "meta_expressions.json").read_bytes()
    assert hashlib.sha256(meta).hexdigest().startswith(SENTENCES)


@pytest.mark.parametrize("source", ["synthetic", "mevis"])
def test_sentences_that_name_nothing_are_read_as_such(source: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path, split="train", videos=3, seed=0, no_target=2)
    for video in open_source(DataSourceConfig(source=source, root=tmp_path, split="train")).videos():
        kinds = {e.kind for e in video.expressions if names_nothing(video, e)}
        assert kinds == ({NO_SUCH_COLOUR, OTHER_MOTION} if source == "synthetic" else {""})
        assert all(e.kind == "" for e in video.expressions if not names_nothing(video, e))
        assert sum(names_nothing(video, e) for e in video.expressions) == 2


def test_an_existing_split_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="exists"):
        write_synthetic(root, split="train", videos=1, seed=0)
