"""ReVOS: JPEGImages/<video>/<frame>.jpg and mask_dict.json of all splits, meta_expressions_<split>_.json of each.

Entries and masks are as in MeViS. Ids of videos are paths, such as UVO/all/<name>. An expression's `type_id` is 0
(referring), 1 (reasoning) or 2 (it names nothing); lists that are not scored may lack it. Follows the loaders of
cilinyan/VISA at ec158fde: utils/d2_datasets/mevis_utils.py (masks) and tools/eval_revos.py (type_id). The files
themselves were not available. So it is an assumption that an entry of type 2 has no annotation with a pixel; another
entry is refused. mask_dict_foreground.json is not read: it is the union of all annotations in a video's sentences.
Users report masks of some videos of TAO and UVO that do not fit their frames; they are not corrected.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.formats.meta_expressions import kind_of, listed_videos
from flowmask.data_pipeline.sources.base import Expression, is_evaluation
from flowmask.data_pipeline.sources.mevis import MevisSource
from flowmask.models.errors import DataError

_PREFIX, _SUFFIX = "meta_expressions_", "_.json"
_KINDS = {0: "referring", 1: "reasoning", 2: "no_target"}


class RevosSource(MevisSource):
    """One split of ReVOS; `root` is the folder of all splits."""

    family = "revos"

    def __init__(self, root: Path, *, split: str):
        meta = _list_of(root, split)
        if not meta.is_file():
            has = ", ".join(_splits(root)) or "no such list"
            raise DataError(f"{meta} is missing (data.root, data.split); {root} has {has}")
        for path in (root / "JPEGImages", root / "mask_dict.json"):
            if not path.exists():
                raise DataError(
                    f"{path} is missing; ReVOS holds JPEGImages, mask_dict.json and {_PREFIX}SPLIT{_SUFFIX}"
                )
        self.open(root, split=split, meta=meta)

    @classmethod
    def evaluation_splits(cls, root: Path, *, split: str) -> list[str]:
        return list(filter(is_evaluation, _splits(root)))

    @classmethod
    def split_ids(cls, root: Path, split: str) -> frozenset[str] | None:
        meta = _list_of(root, split)
        return listed_videos(meta, root) if meta.is_file() else None

    def expression(self, entry: Any, *, where: str, **rest: Any) -> Expression:
        found = super().expression(entry, where=where, **rest)
        kind = kind_of(entry, "type_id", _KINDS, required=is_evaluation(self.split), where=where)
        if kind == "no_target" and found.anno_ids:
            raise DataError(
                f"{where}.type_id is 2, of a sentence that names nothing, but anno_id names {', '.join(found.anno_ids)}"
            )
        return replace(found, kind=kind)


def _list_of(root: Path, split: str) -> Path:
    return root / f"{_PREFIX}{split}{_SUFFIX}"


def _splits(root: Path) -> list[str]:
    return sorted(path.name[len(_PREFIX) : -len(_SUFFIX)] for path in root.glob(f"{_PREFIX}*{_SUFFIX}"))
