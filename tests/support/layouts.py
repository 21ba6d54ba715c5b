"""Small datasets in the published layouts, for the tests of the sources."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from flowmask.data_pipeline.formats import rle

SIZE = (48, 64)  # height, width in px
_MEVIS_LENGTHS = {"birds": 7, "cars": 12, "dogs": 5}
LONG = "the one " * 40 + "that moves left"
_YOUTUBE_LENGTHS = {"0a1b": 6, "2c3d": 4}


def index_map(frame: int) -> np.ndarray:
    """uint8 [H W]: object 1 moves to the right, object 3 leaves after two frames, object 2 does not exist."""
    indices = np.zeros(SIZE, np.uint8)
    indices[10:30, 4 * frame : 4 * frame + 16] = 1
    if frame < 2:
        indices[32:46, 40:60] = 3
    return indices


def write_video(split: Path, video_id: str, *, length: int, masks: bool) -> list[str]:
    names = [f"{5 * i:05d}" for i in range(length)]
    for kind in ("JPEGImages", "Annotations")[: 1 + masks]:
        (split / kind / video_id).mkdir(parents=True)
    for i, name in enumerate(names):
        indices = index_map(i)
        colours = np.array([(90, 110, 80), (200, 30, 40), (0, 0, 0), (20, 60, 220)], np.uint8)
        Image.fromarray(colours[indices]).save(split / "JPEGImages" / video_id / f"{name}.jpg", quality=95)
        if masks:
            picture = Image.fromarray(indices)
            picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])  # mode P
            picture.save(split / "Annotations" / video_id / f"{name}.png")
    return names


def write_meta(root: Path, split: str, videos: dict) -> None:
    folder = root / "meta_expressions" / split
    folder.mkdir(parents=True)
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))


def write_youtube(root: Path) -> None:
    """`train` with masks, `valid` without, and a `test` list whose video is in `valid` too."""
    texts = [("A red  Square", "1"), ("the disc on the right", "3"), ("the moving one", "1")]
    train = {
        video_id: {
            "expressions": {str(i): {"exp": text, "obj_id": obj} for i, (text, obj) in enumerate(texts)},
            "frames": write_video(root / "train", video_id, length=length, masks=True),
        }
        for video_id, length in _YOUTUBE_LENGTHS.items()
    }
    write_meta(root, "train", train)
    objects = {"objects": {"1": {"category": "square"}, "3": {"category": "disc"}}}
    (root / "train/meta.json").write_text(json.dumps({"videos": dict.fromkeys(_YOUTUBE_LENGTHS, objects)}))
    valid = {
        video_id: {
            "expressions": {"0": {"exp": "the square"}},
            "frames": write_video(root / "valid", video_id, length=3, masks=False),
        }
        for video_id in ("4e5f", "6a7b")
    }
    write_meta(root, "valid", valid)
    write_meta(root, "test", {"6a7b": valid["6a7b"]})


def write_davis(root: Path) -> None:
    """One video of two objects, each with a sentence of all four annotators."""
    names = write_video(root / "valid", "blackswan", length=3, masks=True)
    expressions = {
        str(place * 4 + annotator): {"exp": f"object {obj}, words of {annotator}", "obj_id": obj}
        for place, obj in enumerate(("1", "3"))
        for annotator in range(4)
    }
    write_meta(root, "valid", {"blackswan": {"expressions": expressions, "frames": names}})


COCO_JSON, PICKLE, INSTANCES = ("refcoco/instances_refcoco_train.json", "refcoco/refs(unc).p", "refcoco/instances.json")
SIZES = {581857: (48, 64), 98304: (40, 56), 7: (48, 64)}  # COCO image id: height, width in px
TRUTH = {}  # annotation id: bool [H W]
for number, (image, box) in enumerate([(581857, (4, 6, 30, 40)), (581857, (30, 2, 60, 20)), (98304, (0, 0, 56, 9)),
                                       (7, (8, 8, 20, 44))]):  # fmt: skip
    TRUTH[100 + number] = np.zeros(SIZES[image], bool)
    TRUTH[100 + number][box[1] : box[3], box[0] : box[2]] = True
# (COCO image id, annotation id, split, sentences); the sentences of an image are not always side by side
REFS = [
    (581857, 100, "train", ["the Man in red", "left man"]),
    (98304, 102, "train", ["sky"]),
    (581857, 101, "train", ["woman on the right"]),
    (7, 103, "val", ["the bus"]),
]


def segmentation(ann_id):
    """A polygon of two parts for annotation 100, an RLE for 102, else one polygon."""
    if ann_id == 102:
        return rle.encode(TRUTH[ann_id])
    rows, columns = np.nonzero(TRUTH[ann_id])
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    middle = (left + right) // 2 if ann_id == 100 else right
    parts = [(left, middle)] + ([(middle, right)] if ann_id == 100 else [])
    return [[float(v) for v in (a, top, b, top, b, bottom, a, bottom)] for a, b in parts]


def image_entry(image_id):
    height, width = SIZES[image_id]
    return {"file_name": f"COCO_train2014_{image_id:012d}.jpg", "height": height, "width": width, "license": 1}


def write_coco_form(root: Path, split: str) -> None:
    images, annotations = [], []
    for image_id, ann_id, _, texts in (ref for ref in REFS if ref[2] == split):
        for text in texts:
            number = len(images) + 1
            images.append({**image_entry(image_id), "id": number, "original_id": image_id, "caption": text})
            annotations.append(
                {"id": number, "image_id": number, "original_id": ann_id, "segmentation": segmentation(ann_id)}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / f"refcoco/instances_refcoco_{split}.json").write_text(json.dumps(content))


def write_original_form(root: Path) -> None:
    refs, sent_id = [], 0
    for place, (image_id, ann_id, split, texts) in enumerate(REFS):
        sentences = []
        for text in texts:
            sentences.append({"sent": text, "raw": text + "!", "sent_id": sent_id, "tokens": text.split()})
            sent_id += 1
        ref = {"ref_id": place, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "split": split}
        refs.append({**ref, "file_name": f"COCO_{image_id}_{place}.jpg", "sentences": sentences, "sent_ids": ()})
    (root / PICKLE).write_bytes(pickle.dumps(refs, protocol=2))
    owners = {ann_id: image_id for image_id, ann_id, _, _ in REFS}
    content = {
        "images": [{**image_entry(image_id), "id": image_id} for image_id in SIZES],
        "annotations": [
            {"id": ann_id, "image_id": owner, "segmentation": segmentation(ann_id), "bbox": [0, 0, 1, 1]}
            for ann_id, owner in owners.items()
        ],
        "categories": [],
    }
    (root / INSTANCES).write_text(json.dumps(content))


def write_refcoco(root: Path) -> None:
    """Two images in `train`, one in `val`, in both layouts."""
    for folder in ("train2014", "refcoco"):
        (root / folder).mkdir()
    for image_id, size in SIZES.items():
        pixels = np.full((*size, 3), 90, np.uint8)
        for owner, ann_id, _, _ in REFS:
            if owner == image_id:
                pixels[TRUTH[ann_id]] = (200, 30 * (ann_id - 99), 40)
        Image.fromarray(pixels).save(root / "train2014" / image_entry(image_id)["file_name"], quality=95)
    for split in ("train", "val"):
        write_coco_form(root, split)
    write_original_form(root)


def write_mevis(folder: Path) -> None:
    """Three videos with a moving square and a disc that leaves; the last sentence of `birds` names the disc alone."""
    generator = np.random.default_rng(0)
    videos, masks, anno = {}, {}, 0
    for video_id, length in _MEVIS_LENGTHS.items():
        frames = folder / "JPEGImages" / video_id
        frames.mkdir(parents=True)
        names = [f"{5 * i:05d}" for i in range(length)]
        background = generator.integers(0, 255, 3)
        square, disc = [], []
        for i, name in enumerate(names):
            picture = np.tile(background.astype(np.uint8), (*SIZE, 1))
            at_square = np.zeros(SIZE, bool)
            at_square[10:30, 4 * i : 4 * i + 16] = True
            rows, columns = np.indices(SIZE)
            at_disc = (rows - 34) ** 2 + (columns - 60 - 6 * i) ** 2 < 80
            picture[at_square], picture[at_disc] = (200, 30, 40), (20, 60, 220)
            Image.fromarray(picture).save(frames / f"{name}.jpg", quality=95)
            square.append(rle.encode(at_square))
            disc.append(rle.encode(at_disc) if at_disc.any() else None)
        masks |= {str(anno): square, str(anno + 1): disc}
        texts = [
            ("The red  Square on the left", [anno]),
            (f"the bright blue disc of {video_id}", [anno + 1]),
            ("everything that moves", [anno, anno + 1]),
            ("the moving square" if video_id != "cars" else LONG, [anno]),
        ]
        expressions = {str(i): {"exp": t, "obj_id": [0], "anno_id": a} for i, (t, a) in enumerate(texts)}
        videos[video_id] = {"vid_id": anno, "frames": names, "expressions": expressions}
        anno += 2
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    (folder / "mask_dict.json").write_text(json.dumps(masks))


def write_grefs(root: Path, **changes) -> None:
    """gRefCOCO's layout: one JSON of refs, each with a list of annotations."""
    (root / "grefcoco").mkdir()
    shutil.copy(root / INSTANCES, root / "grefcoco/instances.json")
    named = [("both people", [100, 101], False), ("a giraffe", [-1], True), ("one woman", [101], False)]
    refs = [
        {
            "image_id": 581857,
            "split": "train" if place < 3 else "val",
            "sentences": [{"sent": text, "raw": text, "sent_id": place}],
            "ann_id": ids,
            "no_target": empty,
        }
        for place, (text, ids, empty) in enumerate([*named, ("the bus", [103], False)])
    ]
    refs[3]["image_id"] = 7
    refs[1].update(changes)
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))


def plain_rle(mask: np.ndarray) -> dict:
    """A run-length mask whose counts are plain numbers, as COCO's tools write crowds."""
    flat = mask.T.ravel()
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]])))
    return {"size": list(mask.shape), "counts": [0] * bool(flat[0]) + runs.tolist()}


def write_revos(root: Path) -> None:
    """Two videos in `train`, one in `valid`. Counts of object 1 are strings, counts of object 3 are lists.

    The mask is null in frames without the object.
    """
    masks, number = {}, 0
    for split, video_ids in {"train": ("UVO/all/-a1", "TAO/b2"), "valid": ("LVVIS/c3",)}.items():
        videos = {}
        for video_id in video_ids:
            names = write_video(root, video_id, length=6, masks=False)
            maps = [index_map(i) for i in range(len(names))]
            masks[str(number)] = [rle.encode(m == 1) for m in maps]
            masks[str(number + 1)] = [plain_rle(m == 3) if (m == 3).any() else None for m in maps]
            meant = [
                ("the red Square", [number], 0),
                ("which thing leaves?", [str(number + 1)], 1),
                ("everything that would roll", [str(number), number + 1], 1),
                ("the giraffe", [], 2),
            ]
            expressions = {
                str(i): {"exp": text, "obj_id": list(range(len(ids))), "anno_id": ids, "type_id": type_id}
                for i, (text, ids, type_id) in enumerate(meant)
            }
            sides = dict(zip(("height", "width"), SIZE, strict=True))
            videos[video_id] = {"vid_id": number, "frames": names, "expressions": expressions, **sides}
            number += 2
        (root / f"meta_expressions_{split}_.json").write_text(json.dumps({"videos": videos}))
    (root / "mask_dict.json").write_text(json.dumps(masks))


def write_long_rvos(root: Path) -> None:
    """`train`, `valid`, and `test` without masks, one video each; a frame without the object has no mask file."""
    meant = [
        ("the red Square", 1, "static"),
        ("it leaves", "3", "dynamic"),
        ("the square moves", "1", "static+dynamic"),
    ]
    for split, video_id in {"train": "0a", "valid": "1b", "test": "2c"}.items():
        names = write_video(root / split, video_id, length=6, masks=False)
        for i, name in enumerate(names if split != "test" else ()):
            for obj_id in (1, 3):
                if (shown := index_map(i) == obj_id).any():
                    folder = root / split / "Annotations" / video_id / str(obj_id)
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(shown.astype(np.uint8) * np.uint8(255)).save(folder / f"{name}.png")
        expressions = {
            str(i): {"exp": text, "obj_id": obj_id, "type": kind} for i, (text, obj_id, kind) in enumerate(meant)
        }
        content = {"videos": {video_id: {"frames": names, "expressions": expressions}}}
        (root / split / "meta_expressions.json").write_text(json.dumps(content))
