"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO: sentences about COCO train2014 images; an image is a one-frame video.

`data.split` selects the files under `data.root`, for a SET such as refcoco, refcoco+, refcocog:
    SET/SPLIT     SET/instances_SET_SPLIT.json, COCO's form with one image entry per sentence
  SET/BY/SPLIT  SET/refs(BY).p, the original pickle of unc, umd or google, and SET/instances.json; of gRefCOCO
                SET/grefs(BY).json, where a sentence may name several objects, or none: `ann_id` is [] or [-1]
Video ids are coco_<COCO image id>, the same in all sets. Refuses missing files and fields, unknown ids, images and
masks that do not fit each other, and a pickle with more than plain data, which is not executed.
"""

import hashlib
import marshal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowmask.data_pipeline.formats import refs, rle
from flowmask.data_pipeline.formats.fields import check_expression, check_inside, check_name, field, refuse_twice
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.picture import image_size
from flowmask.data_pipeline.formats.reading import Mistakes
from flowmask.data_pipeline.sources.base import Expression, FolderVideo, Source, is_evaluation, refuse_empty
from flowmask.models.errors import DataError
from flowmask.models.files import sha256_of

_IMAGES = ("train2014", "images/train2014", "images/mscoco/images/train2014")
_KEPT = ("id", "image_id", "original_id", "file_name", "caption", "height", "width", "segmentation", "empty", "iscrowd")

# The partitions of published results
_PARTITION = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "grefcoco": "unc"}


def _coco_ids(path: Path) -> frozenset[str]:
    images = field(read_json(path, object_hook=_compact), "images", list, where=str(path))
    numbers = (field(image, "original_id", int, where=f"{path}: images[{i}]") for i, image in enumerate(images))
    return frozenset(map(_video_id, numbers))


def _pickled_ids(path: Path) -> dict[str, frozenset[str]]:
    """Video ids by split, read once for all splits of a file."""
    return _pickled_ids_at(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _pickled_ids_at(path: Path, changed_ns: int) -> dict[str, frozenset[str]]:
    ids: defaultdict[str, set[str]] = defaultdict(set)
    for i, ref in enumerate(refs.read_refs(path)):
        where = f"{path}: refs[{i}]"
        image_id = field(ref, "image_id", int, where=where)
        ids[field(ref, "split", str, where=where)].add(_video_id(image_id))
    return {split: frozenset(found) for split, found in ids.items()}


def _video_id(image_id: int) -> str:
    return f"coco_{image_id:012d}"


@dataclass(frozen=True)
class _Row:
    """One sentence; `image` and `annotations` are entries of the JSON, `where` names the image entry."""

    image_id: int
    image: dict[str, Any]
    where: str
    exp_id: str
    text: str
    annotations: Sequence[dict[str, Any]]
    crowds: int = 0  # annotations that it names but that are left out


class CocoImage(FolderVideo):
    """One image with all of its sentences; polygons and RLEs stay packed until a mask is requested."""

    def __init__(self, rows: Sequence[_Row], *, folder: Path, path: Path):
        first = rows[0]
        spot = f"{first.where}.file_name"
        name = check_name(field(first.image, "file_name", str, where=first.where), where=spot)
        self._path = folder / check_inside(name, where=spot)
        self._json, self._where = path, first.where
        self._given = tuple(field(first.image, side, int, where=first.where) for side in ("height", "width"))
        self._segmentations: dict[str, bytes] = {}
        expressions = []
        for row in rows:
            if (name := field(row.image, "file_name", str, where=row.where)) != first.image["file_name"]:
                raise DataError(
                    f"{row.where}.file_name is {name!r}, but {first.where}, of the same COCO image "
                    f"{row.image_id}, has {first.image['file_name']!r}"
                )
            ids = [self._add(annotation) for annotation in row.annotations]
            expressions.append(Expression(row.exp_id, row.text, tuple(ids)))
        refuse_twice((e.exp_id for e in expressions), where=f"{first.where}: id of a sentence", said="names two")
        super().__init__(
            _video_id(first.image_id),
            folder=folder,
            frame_names=(self._path.stem,),
            expressions=expressions,
            has_masks=True,
        )

    def _add(self, annotation: dict[str, Any]) -> str:
        given = annotation.get("original_id", annotation.get("id"))
        anno_id = check_name(given, where=f"{self._json}: the id of an annotation")
        where = f"{self._json}: annotation {anno_id}"
        segmentation = field(annotation, "segmentation", bytes, where=where)
        if self._segmentations.setdefault(anno_id, segmentation) != segmentation:
            raise DataError(f"{where}.segmentation: two annotations of this id have two of them")
        return anno_id

    def frame_path(self, index: int) -> Path:
        return self._path

    @cached_property
    def size(self) -> tuple[int, int]:
        size = image_size(self._path)
        if size != self._given:
            raise DataError(
                f"{self._where}: height x width is {self._given[0]}x{self._given[1]}, but {self._path} has "
                f"{size[0]}x{size[1]} px"
            )
        return size

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        union = np.zeros(self.size, dtype=bool)
        for anno_id in anno_ids:
            where = f"{self._json}: annotation {anno_id}.segmentation"
            segmentation = marshal.loads(self._segmentations[anno_id])
            read = rle.decode if isinstance(segmentation, dict) else rle.rasterise
            union |= read(segmentation, size=self.size, where=where)
        return np.repeat(union[None], len(ids), axis=0)


class RefcocoSource(Source):
    """One split of one of the three sets, in either form."""

    def __init__(self, root: Path, *, split: str):
        self._split = split
        names = split.split("/")
        if len(names) not in (2, 3) or not all(names):
            raise DataError(
                f"data.split is {split!r}; name SET/SPLIT for COCO's form (refcoco/train) or SET/BY/SPLIT "
                "for the original pickles (refcocog/umd/val)"
            )
        folder = root / names[0]
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder (data.root / the set that data.split names)")
        images = next((root / name for name in _IMAGES if (root / name).is_dir()), None)
        if images is None:
            raise DataError(f"{root} holds no COCO images; expected them in one of {', '.join(_IMAGES)}")
        mistakes = Mistakes()
        if len(names) == 2:
            self._masks_path = self._expressions_path = folder / f"instances_{names[0]}_{names[1]}.json"
            rows = _coco_rows(self._masks_path, mistakes)
        else:
            self._expressions_path = refs.refs_file(folder, names[1])
            self._masks_path = folder / "instances.json"
            rows = _refs_rows(self._expressions_path, self._masks_path, mistakes, split=names[2])
        by_image: defaultdict[int, list[_Row]] = defaultdict(list)  # in the order of their first sentences
        for row in rows:
            by_image[row.image_id].append(row)
        self._crowds = sum(row.crowds for group in by_image.values() for row in group)
        self._videos: list[CocoImage] = []
        for group in by_image.values():
            with mistakes:
                self._videos.append(CocoImage(group, folder=images, path=self._masks_path))
        mistakes.refuse()
        refuse_empty(self._videos, where=self._expressions_path)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        """Evaluation splits of all sets under `root`, for any `split`.

        A set's pickles divide the same images differently. The one of published results counts, and also the one
        of `split` itself; if the first is missing, all count.
        """
        found = []
        own = split.split("/")
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            by = refs.partitions(folder)
            if (standard := _PARTITION.get(folder.name)) in by:
                by = sorted({standard, *([own[1]] if own[0] == folder.name and own[1] in by else [])})
            for name in by:
                splits = _pickled_ids(refs.refs_file(folder, name))
                found += [f"{folder.name}/{name}/{held}" for held in splits if is_evaluation(held)]
            prefix = f"instances_{folder.name}_"
            listed = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.json"))
            found += [f"{folder.name}/{name}" for name in sorted(listed) if is_evaluation(name)]
        return found

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        names = split.split("/")
        if len(names) == 2:
            path = root / names[0] / f"instances_{names[0]}_{names[1]}.json"
            return _coco_ids(path) if path.is_file() else None
        path = refs.refs_file(root / names[0], names[1])
        return _pickled_ids(path).get(names[2]) if len(names) == 3 and path.is_file() else None

    def videos(self) -> Sequence[CocoImage]:
        return self._videos

    def identity(self) -> dict[str, str]:
        # All splits share one pickle, so the name of the split is part of the identity.
        expressions = f"{sha256_of(self._expressions_path)} {self._split}"
        masks = sha256_of(self._masks_path)
        if self._crowds:  # earlier versions drew them, so their caches hold other masks
            masks = _hash(f"{masks} without crowds")
        return {"expressions": _hash(expressions), "masks": masks}


def _coco_rows(path: Path, mistakes: Mistakes) -> Iterator[_Row]:
    content = read_json(path, object_hook=_compact)
    annotations: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for i, annotation in enumerate(field(content, "annotations", list, where=str(path))):
        where = f"{path}: annotations[{i}]"
        field(annotation, "id", int, where=where)
        annotations[field(annotation, "image_id", int, where=where)].append(annotation)
    seen = set()
    for i, image in enumerate(field(content, "images", list, where=str(path))):
        with mistakes:
            where = f"{path}: images[{i}]"
            number = field(image, "id", int, where=where)
            if number in seen:
                raise DataError(f"{where}.id is {number}, as of an earlier image entry; each sentence has its own")
            seen.add(number)
            if number not in annotations:
                raise DataError(f"{where}.id is {number}, which no annotation's image_id names")
            yield _Row(
                image_id=field(image, "original_id", int, where=where),
                image=image,
                where=where,
                exp_id=str(number),
                text=check_expression(field(image, "caption", str, where=where), where=f"{where}.caption"),
                annotations=[a for a in annotations[number] if not a.get("empty")],  # as for gRefCOCO's conversion
            )


def _refs_rows(refs_path: Path, instances_path: Path, mistakes: Mistakes, *, split: str) -> Iterator[_Row]:
    listed = refs.read_refs(refs_path)
    splits = [field(ref, "split", str, where=f"{refs_path}: refs[{i}]") for i, ref in enumerate(listed)]
    if split not in splits:
        raise DataError(
            f"{refs_path} has no split {split!r}; it has {', '.join(map(repr, sorted(set(splits)))) or 'none'}"
        )
    instances = read_json(instances_path, object_hook=_compact)
    images, annotations = (_by_id(instances, name, path=instances_path) for name in ("images", "annotations"))
    for i, ref in enumerate(listed):
        if splits[i] != split:
            continue
        with mistakes:
            where = f"{refs_path}: refs[{i}]"
            image_id, ann_ids = field(ref, "image_id", int, where=where), refs.annotations_of(ref, where=where)
            if image_id not in images:
                raise DataError(f"{where}.image_id names {image_id}, which {instances_path} does not hold")
            for ann_id in ann_ids:
                if annotations.get(ann_id, {}).get("image_id") != image_id:
                    raise DataError(
                        f"{where}.ann_id names {ann_id}, which {instances_path} does not hold for image {image_id}"
                    )
            named = [annotations[ann_id] for ann_id in ann_ids]
            meant = refs.without_crowds(named, refs_path, where=where)
            for j, sentence in enumerate(field(ref, "sentences", list, where=where)):
                spot = f"{where}.sentences[{j}]"
                yield _Row(
                    image_id=image_id,
                    image=images[image_id],
                    where=f"{instances_path}: image {image_id}",
                    exp_id=str(field(sentence, "sent_id", int, where=spot)),
                    text=refs.sentence_of(sentence, where=spot),
                    annotations=meant,
                    crowds=len(named) - len(meant),
                )


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _by_id(content: Any, name: str, *, path: Path) -> dict[int, dict[str, Any]]:
    entries = field(content, name, list, where=str(path))
    by_id = {field(entry, "id", int, where=f"{path}: {name}[{i}]"): entry for i, entry in enumerate(entries)}
    refuse_twice((str(entry["id"]) for entry in entries), where=f"{path}: {name}.id", said="names two entries")
    return by_id


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """An image or annotation entry with only the needed fields; polygons in bytes, a quarter of their size."""
    if "segmentation" in entry:
        entry["segmentation"] = marshal.dumps(entry["segmentation"], 2)  # equal values, equal bytes
    elif "file_name" not in entry:
        return entry
    return {name: entry[name] for name in _KEPT if name in entry}
