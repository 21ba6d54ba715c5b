"""First frames of scenes in the layout of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO, which share their pictures."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowmask.data_pipeline.formats.rle import encode
from flowmask.data_pipeline.sources.synthetic import JPEG_QUALITY
from flowmask.launch.toy.scenes import SIZE_PX, Scene

_SETS = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p"}
_IMAGES = "train2014"
_Told = tuple[list[str], tuple[int, ...]]  # sentences, and their objects


def write_refcoco(root: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """The sets with these splits; also gRefCOCO, in which a sentence may name several objects or none."""
    pictures = [(split, scene.still()) for split, scenes in splits.items() for scene in scenes]
    (root / _IMAGES).mkdir(parents=True)
    for _, scene in pictures:
        file = root / _IMAGES / _file_name(scene)
        Image.fromarray(scene.frames[0]).save(file, quality=JPEG_QUALITY, subsampling=0)
    instances = json.dumps(_instances([scene for _, scene in pictures]))
    alone = _refs([(split, scene, _by_object(scene)) for split, scene in pictures])
    for name, file_name in _SETS.items():
        (root / name).mkdir()
        (root / name / "instances.json").write_text(instances)
        (root / name / file_name).write_bytes(pickle.dumps(alone, protocol=2))
    several = _refs([(split, scene, _each(scene)) for split, scene in pictures])
    (root / "grefcoco").mkdir()
    (root / "grefcoco" / "instances.json").write_text(instances)
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps([_several(ref) for ref in several]))


def _by_object(scene: Scene) -> list[_Told]:
    """The sentences about exactly one object, by object."""
    texts: dict[int, list[str]] = {}
    for text, k in scene.of_one_object():
        texts.setdefault(k, []).append(text)
    return [(own, (k,)) for k, own in texts.items()]


def _each(scene: Scene) -> list[_Told]:
    """Every sentence alone, also those that name nothing."""
    seen = [one for one in scene.sentences if all(scene.masks[k].any() for k in one[1])]
    named: list[_Told] = [([text], objects) for text, objects in seen]
    return [*named, *(([text], ()) for text, _ in scene.nothing)]


def _refs(asked: Sequence[tuple[str, Scene, list[_Told]]]) -> list[dict[str, Any]]:
    refs: list[dict[str, Any]] = []
    sent_id = 0
    for split, scene, groups in asked:
        for texts, objects in groups:
            sentences = [
                {"sent": text, "raw": text, "sent_id": sent_id + i, "tokens": text.split()}
                for i, text in enumerate(texts)
            ]
            sent_id += len(texts)
            ids = [_annotation(scene, k) for k in objects]
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": ids[0] if len(ids) == 1 else ids,
                    "image_id": _image(scene),
                    "category_id": 1,
                    "split": split,
                    "file_name": _file_name(scene),
                    "sentences": sentences,
                    "sent_ids": [one["sent_id"] for one in sentences],
                }
            )
    return refs


def _several(ref: dict[str, Any]) -> dict[str, Any]:
    """A ref in gRefCOCO's form: a list of annotations, [-1] if it names nothing."""
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    return {**ref, "ann_id": ids or [-1], "no_target": not ids}


def _instances(scenes: Sequence[Scene]) -> dict[str, Any]:
    sides = {"height": SIZE_PX, "width": SIZE_PX}
    images = [{"id": _image(scene), "file_name": _file_name(scene), **sides} for scene in scenes]
    annotations = [
        {"id": _annotation(scene, k), "image_id": _image(scene), "segmentation": encode(mask[0]), "category_id": 1}
        for scene in scenes
        for k, mask in enumerate(scene.masks)
        if mask.any()
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "shape"}]}


def _image(scene: Scene) -> int:
    return 1000 + scene.number


def _annotation(scene: Scene, k: int) -> int:
    return 10 * _image(scene) + k


def _file_name(scene: Scene) -> str:
    return f"COCO_train2014_{_image(scene):012d}.jpg"
