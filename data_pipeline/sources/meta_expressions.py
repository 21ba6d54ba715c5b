"""meta_expressions.json, in which MeViS and Ref-YouTube-VOS list a split's videos: id -> frames, expressions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.sources.base import Expression, check_expression, check_name, check_names, field, read_json
from flowmask.models.errors import DataError


def listed_videos(meta: Path, frames: Path) -> frozenset[str] | None:
    """Ids of a split's videos: the keys of `videos` in its JSON, else the folders of its frames, else None."""
    if meta.is_file():
        return frozenset(map(str, field(read_json(meta), "videos", dict, where=str(meta))))
    return frozenset(path.name for path in frames.iterdir()) if frames.is_dir() else None


def read_entry(
    meta: Path, video_id: str, entry: Any, *, means: Callable[..., tuple[str, ...]]
) -> tuple[list[str], list[Expression]]:
    """Names of the frames, sorted, and expressions of one video; DataError names the field that is wrong.

    means: called as means(expression's entry, video_id=, frames=, where=): the annotations whose union is meant
    """
    check_name(video_id, where=f"{meta}: an id in videos")
    where = f"{meta}: videos.{video_id}"
    names = sorted(check_names(field(entry, "frames", list, where=where), where=f"{where}.frames"))
    if not names:
        raise DataError(f"{where}.frames is empty")
    expressions = []
    for exp_id, expression in field(entry, "expressions", dict, where=where).items():
        spot = f"{where}.expressions.{check_name(exp_id, where=f'{where}: an id in expressions')}"
        text = check_expression(field(expression, "exp", str, where=spot), where=f"{spot}.exp")
        anno_ids = means(expression, video_id=video_id, frames=len(names), where=spot)
        expressions.append(Expression(exp_id, text, anno_ids))
    return names, expressions
