"""Small A2D-Sentences and JHMDB-Sentences sets in the layout of their public loaders, and a similar JSONL set."""

import json
from pathlib import Path

import numpy as np
from film import SIZE, write_film
from PIL import Image

from flowmask.data_pipeline.formats import rle

FRAMES = 6


def box(frame: int, number: int = 1) -> np.ndarray:
    """bool [H W]: the place of object `number` in a frame."""
    mask = np.zeros(SIZE, bool)
    mask[4 + 2 * frame : 20 + 2 * frame, 20 * number - 16 : 20 * number] = True
    return mask


def write_h5(path: Path, masks: dict[int, np.ndarray]) -> None:
    """One annotated frame. MATLAB writes the last axis first, and a single instance has no first axis."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    stack = np.stack([mask.T.astype(np.uint8) for mask in masks.values()])
    with h5py.File(path, "w") as file:
        file["instance"] = np.array(list(masks), np.float64)
        file["reMask"] = stack[0] if len(stack) == 1 else stack


def write_a2d(root: Path) -> None:
    """`bird`: instances 1 and 3 in frame 2, instance 1 alone in frame 5, counted from 1; `cat` is in the test split."""
    videos, masks = root / "Release/clips320H", root / "text_annotations/a2d_annotation_with_instances"
    videos.mkdir(parents=True)
    for name in ("bird", "cat"):
        write_film(videos / f"{name}.mp4", frames=FRAMES)
        write_h5(masks / name / "00002.h5", {1: box(1), 3: box(1, 3)})
        write_h5(masks / name / "00005.h5", {1: box(4)})
    for split, name in (("train", "bird"), ("test", "cat")):
        texts = [("a bird  flying", name, 2, 1), ("other bird", name, 2, 3), ("a bird  flying", name, 5, 1)]
        (root / f"a2d_sentences_single_frame_{split}_annotations.json").write_text(json.dumps(texts))


def write_jhmdb(root: Path) -> None:
    """One video of six PNG frames; 2 and 6 (counted from 1) are annotated. Its .mat has a mask of each frame."""
    from scipy.io import savemat

    frames, masks = root / "Rename_Images/run/man_1", root / "puppet_mask/run/man_1"
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    for i in range(FRAMES):
        Image.fromarray(np.full((*SIZE, 3), 30 * i, np.uint8)).save(frames / f"{i + 1:05d}.png")
    savemat(
        masks / "puppet_mask.mat",
        {"part_mask": np.stack([box(i).astype(np.uint8) for i in range(FRAMES)], axis=2)},
        do_compression=True,
    )
    before = "./jhmdb_sentences"
    entries = [
        [
            "man_1",
            f"{before}/Rename_Images/run/man_1/{i:05d}.png",
            f"{before}/puppet_mask/run/man_1/puppet_mask.mat",
            FRAMES,
            "man running",
        ]
        for i in (2, 6)
    ]
    (root / "jhmdb_sentences_samples_metadata.json").write_text(json.dumps(entries))


def write_listed(root: Path, *, annotated: list[int] | None, without_target: bool = False) -> Path:
    """A JSONL of one video with a mask for every frame; `annotated` lists the frames whose mask counts."""
    root.mkdir(exist_ok=True)
    write_film(root / "film.mp4", frames=FRAMES)
    entry = {
        "video": "film.mp4",
        "expressions": [{"text": "the box", "masks": [rle.encode(box(i)) for i in range(FRAMES)]}],
    }
    if annotated is not None:
        entry["annotated"] = annotated
    if without_target:
        entry["expressions"].append({"text": "the unicorn", "masks": []})
    (root / "train.jsonl").write_text(json.dumps(entry))
    return root
