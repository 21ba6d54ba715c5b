"""Scenes in the layouts of A2D-Sentences and JHMDB-Sentences: masks of few frames, in HDF5 and in MATLAB's files."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowmask.data_pipeline.video.writing import VideoWriter
from flowmask.launch.toy.scenes import FRAMES, SIZE_PX, Scene

_ANNOTATED = (5, 14)  # frames from 0
_FPS = 5
_CLASS = "shape"
_HEADER_BYTES, _HEADER = 116, b"MATLAB 5.0 MAT-file, written by flowmask toy"  # scipy's own contains the time


def write_a2d(root: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """`train` and `test`: one mp4 each, two annotated frames of it, and sentences about the objects seen there."""
    import h5py

    videos, masks = root / "Release/clips320H", root / "text_annotations/a2d_annotation_with_instances"
    videos.mkdir(parents=True)
    for split, scenes in splits.items():
        entries: list[tuple[str, str, int, int]] = []
        for scene in scenes:
            name = f"{split}_{scene.number:05d}"
            with VideoWriter(videos / f"{name}.mp4", height=SIZE_PX, width=SIZE_PX, fps=_FPS) as writer:
                for frame in scene.frames:
                    writer.add(frame)
            (masks / name).mkdir(parents=True)
            for i in _ANNOTATED:
                seen = [k for k, mask in enumerate(scene.masks) if mask[i].any()]
                stack = np.stack([scene.masks[k, i].T.astype(np.uint8) for k in seen])
                with h5py.File(masks / name / f"{i + 1:05d}.h5", "w") as file:
                    file["instance"] = np.array([k + 1 for k in seen], np.float64)
                    file["reMask"] = stack[0] if len(seen) == 1 else stack  # as MATLAB writes it
                entries += [(text, name, i + 1, k + 1) for text, k in scene.of_one_object() if k in seen]
        listed = [[text, name, frame, instance] for text, name, frame, instance in entries]
        (root / f"a2d_sentences_single_frame_{split}_annotations.json").write_text(json.dumps(listed))


def write_jhmdb(root: Path, *, test: Sequence[Scene]) -> None:
    """Folders of PNG frames with one object each, with known masks in every frame."""
    from scipy.io import savemat

    entries: list[list[Any]] = []
    for scene in test:
        text, k = scene.of_one_object()[0]
        name = f"test_{scene.number:05d}"
        frames, masks = f"Rename_Images/{_CLASS}/{name}", f"puppet_mask/{_CLASS}/{name}"
        for folder in (frames, masks):
            (root / folder).mkdir(parents=True)
        for i, frame in enumerate(scene.frames):
            Image.fromarray(frame).save(root / frames / f"{i + 1:05d}.png")
        written = io.BytesIO()
        part_mask = np.moveaxis(scene.masks[k], 0, 2).astype(np.uint8)  # [H W F]
        savemat(written, {"part_mask": part_mask}, do_compression=True)
        content = _HEADER.ljust(_HEADER_BYTES) + written.getvalue()[_HEADER_BYTES:]
        (root / masks / "puppet_mask.mat").write_bytes(content)
        entries += [
            [name, f"./{root.name}/{frames}/{i + 1:05d}.png", f"./{root.name}/{masks}/puppet_mask.mat", FRAMES, text]
            for i in _ANNOTATED
        ]
    (root / "jhmdb_sentences_samples_metadata.json").write_text(json.dumps(entries))
