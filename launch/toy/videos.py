"""Scenes in the layouts of MeViS, Ref-YouTube-VOS, Ref-DAVIS17, ReVOS and Long-RVOS; read by the sources of that name.

A video's name contains its split, so that no split shows a video of another one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowmask.data_pipeline.formats.rle import encode
from flowmask.data_pipeline.sources.ref_davis17 import ANNOTATORS
from flowmask.data_pipeline.sources.synthetic import FRAME_STRIDE, write_frames
from flowmask.launch.toy.scenes import FRAMES, SIZE_PX, Scene

_PALETTE = (0, 0, 0, 215, 35, 35, 35, 170, 55, 40, 75, 225)  # red, green, blue of the background and three objects
_NAMES = [f"{FRAME_STRIDE * i:05d}" for i in range(FRAMES)]


def write_mevis(root: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Splits in which sentences may name several objects or none. `valid` has no masks: only its server has them."""
    for split, scenes in splits.items():
        public = split != "valid"
        videos: dict[str, Any] = {}
        masks: dict[str, Any] = {}
        for scene in scenes:
            write_frames(root / split / "JPEGImages" / _name(split, scene), scene.frames, _NAMES)
            told = [entry if public else {"exp": entry["exp"]} for entry in _told(scene)]
            videos[_name(split, scene)] = {"vid_id": scene.number, "frames": _NAMES, "expressions": _numbered(told)}
            masks |= _masks(scene)
        if public:
            (root / split / "mask_dict.json").write_text(json.dumps(masks))
        (root / split / "meta_expressions.json").write_text(json.dumps({"videos": videos}))


def write_youtube(root: Path, *, train: Sequence[Scene], valid: Sequence[Scene]) -> None:
    """`train` with masks, `valid` without; each video of `train` has a sentence that names nothing."""
    entries: dict[str, Any] = {}
    for scene in train:
        told: list[dict[str, Any]] = [{"exp": text, "obj_id": str(k + 1)} for text, k in scene.of_one_object()]
        told += [{"exp": text, "obj_id": []} for text, _ in scene.nothing[:1]]
        entries[_name("train", scene)] = {"expressions": _numbered(told), "frames": _NAMES}
    _write_split(root, "train", entries, train, masks=True)
    asked = {_name("valid", one): [{"exp": text} for text, _ in one.of_one_object()] for one in valid}
    entries = {name: {"expressions": _numbered(texts), "frames": _NAMES} for name, texts in asked.items()}
    _write_split(root, "valid", entries, valid, masks=False)


def write_davis(root: Path, *, valid: Sequence[Scene]) -> None:
    """One split, in which each object has a sentence of every annotator."""
    entries: dict[str, Any] = {}
    for scene in valid:
        told: list[dict[str, Any]] = []
        texts: dict[int, list[str]] = {}
        for text, k in scene.of_one_object():
            texts.setdefault(k, []).append(text)
        for k, own in texts.items():
            told += [{"exp": own[i % len(own)], "obj_id": str(k + 1)} for i in range(ANNOTATORS)]
        entries[_name("valid", scene)] = {"expressions": _numbered(told), "frames": _NAMES}
    _write_split(root, "valid", entries, valid, masks=True)


def write_revos(root: Path, *, valid: Sequence[Scene]) -> None:
    """One split; ids of videos are paths."""
    videos: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    for scene in valid:
        name, sides = f"TOY/{_name('valid', scene)}", {"height": SIZE_PX, "width": SIZE_PX}
        write_frames(root / "JPEGImages" / name, scene.frames, _NAMES)
        told = [{**entry, "type_id": 0 if entry["anno_id"] else 2} for entry in _told(scene)]
        videos[name] = {"vid_id": scene.number, "frames": _NAMES, "expressions": _numbered(told), **sides}
        masks |= _masks(scene)
    (root / "mask_dict.json").write_text(json.dumps(masks))
    (root / "meta_expressions_valid_.json").write_text(json.dumps({"videos": videos}))


def write_long_rvos(root: Path, *, valid: Sequence[Scene]) -> None:
    """One split; a frame without an object has no picture of it."""
    videos: dict[str, Any] = {}
    for scene in valid:
        name = _name("valid", scene)
        write_frames(root / "valid" / "JPEGImages" / name, scene.frames, _NAMES)
        kinds = ("static", "dynamic", "static+dynamic")
        told = [
            {"exp": text, "obj_id": str(k + 1), "type": kinds[i % len(kinds)]}
            for i, (text, k) in enumerate(scene.of_one_object())
        ]
        for k in {int(entry["obj_id"]) - 1 for entry in told}:
            folder = root / "valid" / "Annotations" / name / str(k + 1)
            folder.mkdir(parents=True)
            for frame, mask in zip(_NAMES, scene.masks[k], strict=True):
                if mask.any():
                    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(folder / f"{frame}.png")
        videos[name] = {"frames": _NAMES, "expressions": _numbered(told)}
    (root / "valid" / "meta_expressions.json").write_text(json.dumps({"videos": videos}))


def _told(scene: Scene) -> list[dict[str, Any]]:
    """Sentences in MeViS's form, with the kind of those that name nothing."""
    named: list[dict[str, Any]] = [
        {"exp": text, "obj_id": list(objects), "anno_id": [_annotation(scene, k) for k in objects]}
        for text, objects in scene.sentences
    ]
    return [*named, *({"exp": text, "obj_id": [], "anno_id": [], "kind": kind} for text, kind in scene.nothing)]


def _masks(scene: Scene) -> dict[str, Any]:
    """Run lengths of each object by annotation, null in frames without it."""
    return {
        str(_annotation(scene, k)): [encode(frame) if frame.any() else None for frame in mask]
        for k, mask in enumerate(scene.masks)
    }


def _annotation(scene: Scene, k: int) -> int:
    return 10 * scene.number + k


def _write_split(root: Path, split: str, entries: dict[str, Any], scenes: Sequence[Scene], *, masks: bool) -> None:
    """A split of Ref-YouTube-VOS: its list, frames and, if they are public, an index map of each frame."""
    for scene in scenes:
        name = _name(split, scene)
        write_frames(root / split / "JPEGImages" / name, scene.frames, _NAMES)
        if masks:
            (root / split / "Annotations" / name).mkdir(parents=True)
            for frame, indices in zip(_NAMES, scene.index_maps(), strict=True):
                picture = Image.fromarray(indices)
                picture.putpalette(_PALETTE)
                picture.save(root / split / "Annotations" / name / f"{frame}.png")
    folder = root / "meta_expressions" / split
    folder.mkdir(parents=True)
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": entries}))


def _numbered(entries: Sequence[Any]) -> dict[str, Any]:
    return {str(number): entry for number, entry in enumerate(entries)}


def _name(split: str, scene: Scene) -> str:
    return f"{split}_{scene.number:05d}"
