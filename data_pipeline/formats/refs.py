"""The files of sentences about COCO's images: the pickle refs(BY).p of RefCOCO, RefCOCO+ and RefCOCOg, and the JSON
grefs(BY).json of gRefCOCO. It has the same form, but a sentence may name several objects or none.

gRefCOCO follows the loaders of henghuiding/ReLA at a389648e: gres_model/data/datasets/{grefer,grefcoco}.py. They
encode `raw`; this code uses the normalised `sent`, as for the other sets. Crowds are left out, as in ReLA. The file
itself was not available.
"""

from pathlib import Path
from typing import Any

from flowmask.data_pipeline.formats.fields import check_expression, field, is_int
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.plain_pickle import read_plain_pickle
from flowmask.data_pipeline.formats.reading import shown
from flowmask.models.errors import DataError
from flowmask.models.text import clean, has_words

_NOTHING = -1  # in place of an annotation's id


def partitions(folder: Path) -> list[str]:
    """The BY of every file of a set."""
    files = [*folder.glob("refs(*).p"), *folder.glob("grefs(*).json")]
    return sorted({path.name.partition("(")[2].rpartition(")")[0] for path in files})


def refs_file(folder: Path, by: str) -> Path:
    """The file of a partition; the pickle's path if there is none."""
    json_file = folder / f"grefs({by}).json"
    return json_file if json_file.is_file() else folder / f"refs({by}).p"


def read_refs(path: Path) -> list[Any]:
    """The entries of a file; DataError if it is missing, damaged, or has more than plain data."""
    refs = read_json(path) if path.suffix == ".json" else read_plain_pickle(path)
    if not isinstance(refs, list):
        raise DataError(f"{path} holds a {type(refs).__name__}; expected a list of refs")
    return refs


def annotations_of(ref: Any, *, where: str) -> list[int]:
    """Ids of the annotations of a ref, empty if it names nothing. Raises DataError for an invalid id."""
    if not isinstance(ref, dict) or "ann_id" not in ref:
        raise DataError(f"{where} has no field 'ann_id'")
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    if not all(map(is_int, ids)):
        raise DataError(f"{where}.ann_id is {shown(ref['ann_id'])!r}; expected an int, or a list of them")
    ids = [] if ids == [_NOTHING] else ids
    if "no_target" in ref and bool(ref["no_target"]) == bool(ids):
        named = ", ".join(map(str, ids)) or "nothing"
        raise DataError(f"{where}: no_target is {shown(ref['no_target'])!r}, but ann_id names {named}")
    return ids


def without_crowds(named: list[dict[str, Any]], path: Path, *, where: str) -> list[dict[str, Any]]:
    """The annotations of a ref in `path`: without crowds in gRefCOCO; DataError if it names only crowds."""
    kept = [a for a in named if not a.get("iscrowd")] if path.suffix == ".json" else named
    if named and not kept:
        raise DataError(f"{where}.ann_id names only crowds, which are not objects of gRefCOCO")
    return kept


def sentence_of(sentence: Any, *, where: str) -> str:
    """`sent`, the normalised sentence; `raw`, the typed one, if `sent` is empty."""
    text = field(sentence, "sent", str, where=where)
    raw = sentence.get("raw")
    unseen = isinstance(raw, str) and not has_words(clean(text, lowercase=True))
    return check_expression(raw if unseen else text, where=f"{where}.sent")
