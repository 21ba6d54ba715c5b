"""meta_expressions.json, in which MeViS and Ref-YouTube-VOS list a split's videos: id -> frames, expressions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from flowmask.data_pipeline.formats.reading import Mistakes
from flowmask.data_pipeline.sources.base import Expression
from flowmask.models.errors import DataError


def listed_videos(meta: Path, frames: Path) -> frozenset[str] | None:
    """Ids of a split's videos: the keys of `videos` in its JSON, else the folders of its frames, else None."""
    if meta.is_file():
        return frozenset(map(str, field(read_json(meta), "videos", dict, where=str(meta))))
    return frozenset(path.name for path in frames.iterdir()) if frames.is_dir() else None


def read_entry(
    meta: Path, video_id: str, entry: Any, *, means: Callable[..., tuple[str, ...]]
) -> tuple[list[str], list[Expression]]:
    """Names of the frames as they are listed, and expressions of one video; DataError names the fields that are wrong.

    means: called as means(expression's entry, video_id=, frames=, where=): the annotations whose union is meant
    """
    spot = f"{meta}: an id in videos"
    check_inside(check_name(video_id, where=spot), where=spot)
    where = f"{meta}: videos.{video_id}"
    names = _frame_names(field(entry, "frames", list, where=where), where=f"{where}.frames")
    expressions, mistakes = [], Mistakes()
    for exp_id, expression in field(entry, "expressions", dict, where=where).items():
        with mistakes:
            spot = f"{where}.expressions.{check_name(exp_id, where=f'{where}: an id in expressions')}"
            text = check_expression(field(expression, "exp", str, where=spot), where=f"{spot}.exp")
            anno_ids = means(expression, video_id=video_id, frames=len(names), where=spot)
            expressions.append(Expression(exp_id, text, anno_ids))
    mistakes.refuse()
    return names, expressions


def _frame_names(listed: Sequence[Any], *, where: str) -> list[str]:
    """Names of a video's frames without the suffix of a picture; each names a file, and no two name one."""
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
