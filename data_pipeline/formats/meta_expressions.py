"""meta_expressions.json, the list of a split's videos in MeViS and later datasets: id -> frames, expressions."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flowmask.data_pipeline.formats.fields import (
    check_expression,
    check_inside,
    check_name,
    check_names,
    field,
    refuse_twice,
)
from flowmask.data_pipeline.formats.json_file import read_json
from flowmask.data_pipeline.formats.names import same_file
from flowmask.data_pipeline.formats.picture import SUFFIXES
from flowmask.data_pipeline.formats.reading import Mistakes, shown
from flowmask.models.errors import DataError

E = TypeVar("E")


def listed_videos(meta: Path, frames: Path) -> frozenset[str] | None:
    """Ids of a split's videos: the keys of `videos` in its JSON; without it the folders of its frames; else None."""
    if meta.is_file():
        return frozenset(map(str, field(read_json(meta), "videos", dict, where=str(meta))))
    return frozenset(path.name for path in frames.iterdir()) if frames.is_dir() else None


def read_entry(meta: Path, video_id: str, entry: Any, *, expression: Callable[..., E]) -> tuple[list[str], list[E]]:
    """Names of the frames in their order, and expressions of one video; raises DataError that names the wrong fields.

    expression: makes one expression, called as expression(its entry, exp_id=, text=, video_id=, frames=, where=)
    """
    spot = f"{meta}: an id in videos"
    check_inside(check_name(video_id, where=spot), where=spot)
    where = f"{meta}: videos.{video_id}"
    names = _frame_names(field(entry, "frames", list, where=where), where=f"{where}.frames")
    expressions, mistakes = [], Mistakes()
    for exp_id, item in field(entry, "expressions", dict, where=where).items():
        with mistakes:
            spot = f"{where}.expressions.{check_name(exp_id, where=f'{where}: an id in expressions')}"
            text = check_expression(field(item, "exp", str, where=spot), where=f"{spot}.exp")
            made = expression(item, exp_id=exp_id, text=text, video_id=video_id, frames=len(names), where=spot)
            expressions.append(made)
    mistakes.refuse()
    return names, expressions


def kind_of(entry: dict[str, Any], name: str, kinds: Mapping[Any, str], *, required: bool, where: str) -> str:
    """The kind of a sentence by its field `name`, one of `kinds`; "" if it is optional and missing.

    required: True for a benchmark, which reports its scores by kind; training needs none
    """
    if name not in entry and not required:
        return ""
    value = field(entry, name, object, where=where)
    for known, kind in kinds.items():
        if type(value) is type(known) and value == known:  # true is not 1
            return kind
    raise DataError(f"{where}.{name} is {shown(value)!r}; expected one of {', '.join(map(str, kinds))}")


def _frame_names(listed: Sequence[Any], *, where: str) -> list[str]:
    """Names of a video's frames without the picture's suffix; each names a different file."""
    names = [_without_suffix(name) for name in check_names(listed, where=where)]
    if not names:
        raise DataError(f"{where} is empty")
    for i, name in enumerate(names):
        if "/" in check_inside(name, where=f"{where}[{i}]"):
            raise DataError(f"{where}[{i}] is {name[:40]!r}; expected the name of a file in the video's folder")
    refuse_twice(map(same_file, names), where=where)
    return names


def _without_suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return stem if stem and f"{dot}{suffix}".lower() in SUFFIXES else name
