"""The synthetic dataset on disk: moving coloured shapes in the layout of MeViS.

Decides the scenes of a split and their storage: `<root>/<split>/JPEGImages/<video>/<frame>.jpg`,
meta_expressions.json and mask_dict.json (COCO RLE per frame, null if the object is absent). It is read like
MeViS; the source `synthetic` also reads the kind of a sentence that names nothing. Deterministic in
(seed, split); another split or seed gives other scenes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowmask.data_pipeline.formats.meta_expressions import kind_of
from flowmask.data_pipeline.formats.rle import encode
from flowmask.data_pipeline.randomness import mix64
from flowmask.data_pipeline.sources.base import Expression
from flowmask.data_pipeline.sources.mevis import MevisSource
from flowmask.data_pipeline.sources.synthetic_scene import BLOCK, NO_SUCH_COLOUR, OTHER_MOTION, SceneBlock, draw_block
from flowmask.models.errors import DataError

JPEG_QUALITY = 95
FRAME_STRIDE = 5  # frames are named 00000, 00005, ... as in MeViS
_KINDS = {kind: kind for kind in (NO_SUCH_COLOUR, OTHER_MOTION)}


class SyntheticSource(MevisSource):
    """One split of the synthetic dataset: MeViS plus the kind of each sentence that names nothing."""

    def expression(self, entry: Any, *, where: str, **rest: Any) -> Expression:
        kind = kind_of(entry, "kind", _KINDS, required=False, where=where)
        return replace(super().expression(entry, where=where, **rest), kind=kind)


def write_synthetic(
    root: Path,
    *,
    split: str,
    videos: int,
    seed: int,
    frames: int = 5,
    size: int = 64,
    sentences: int = 5,
    no_target: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `videos` videos of `frames` frames of `size` x `size` pixels below `<root>/<split>`.

    Every video has 2 or 3 objects, 2 to `sentences` sentences about them, and up to `no_target` more sentences that
    name nothing. These alternate: a colour that no object has; an object's colour and shape with another motion.
    `on_progress` receives the number of written videos. The two JSON files come last.
    Raises DataError if `<root>/<split>` already exists.
    """
    folder = root / split
    if folder.exists():
        raise DataError(f"{folder} exists: choose another root or split, or remove it")
    split_seed = mix64(seed, int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "big"))
    meta: dict[str, Any] = {}
    masks: dict[str, list[dict[str, Any] | None]] = {}
    for number in range(videos):
        scene = number % BLOCK
        if scene == 0:
            block = draw_block(
                split_seed, number // BLOCK, frames=frames, size=size, sentences=sentences, no_target=no_target
            )
        name = f"{split}_{number:05d}"
        frame_names = [f"{FRAME_STRIDE * f:05d}" for f in range(frames)]
        write_frames(folder / "JPEGImages" / name, block.frames[scene], frame_names)
        meta[name] = _describe(block, scene, number, frame_names, masks)
        if on_progress is not None:
            on_progress(number + 1)
    (folder / "mask_dict.json").write_text(json.dumps(masks))
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": meta}))


def write_frames(folder: Path, frames: NDArray[np.uint8], names: list[str]) -> None:
    """Write a new folder with one JPEG per frame. frames: uint8 [F H W 3] rgb8; names: without the suffix."""
    folder.mkdir(parents=True)
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(folder / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)


def _describe(
    block: SceneBlock, scene: int, number: int, frame_names: list[str], masks: dict[str, list[dict[str, Any] | None]]
) -> dict[str, Any]:
    """The meta entry of one video; adds the RLEs of every object of a sentence to `masks`."""
    expressions: dict[str, Any] = {}
    for exp_id, (text, objects) in enumerate(block.sentences[scene]):
        anno_ids = [number * block.masks.shape[1] + k for k in objects]
        expressions[str(exp_id)] = {"exp": text, "obj_id": list(objects), "anno_id": anno_ids}
        for anno_id, k in zip(anno_ids, objects, strict=True):
            if str(anno_id) not in masks:
                masks[str(anno_id)] = [encode(m) if m.any() else None for m in block.masks[scene, k]]
    for exp_id, (text, kind) in enumerate(block.nothing[scene], start=len(expressions)):
        expressions[str(exp_id)] = {"exp": text, "obj_id": [], "anno_id": [], "kind": kind}
    return {"expressions": expressions, "vid_id": number, "frames": frame_names}
