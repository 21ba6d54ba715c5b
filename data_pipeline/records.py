"""Encoded clips to one shard and its sidecar: what a unit of work leaves behind.

The sidecar, written after the tar, says what it holds and where: the index is made of sidecars alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline import rle
from data_pipeline.clips import clip_facts
from data_pipeline.encode import EncodedClip
from data_pipeline.index import COLUMNS
from data_pipeline.manifest import LONG_TEXT, SHORT_TEXT
from data_pipeline.sealed import seal, unseal
from data_pipeline.shards import (
    RecordPlace,
    ShardWriter,
    shard_name,
    sidecar_name,
    whole_file,
    write_file,
)
from models.errors import CacheError

Embeddings = Mapping[int, Mapping[int, Tensor]]  # by sentence number and token limit


@dataclass(frozen=True)
class Sidecar:
    """A finished unit. Without records (all its masks were empty) it has no tar: `size` is 0.

    shapes[i] is (F, H, W) in px; examples hold a place in `shapes`, then the index's COLUMNS.
    """

    unit: int
    records: int
    dropped_empty_masks: int
    size: int
    sha256: str
    text_dim: int
    made_with: dict[str, str]
    shapes: list[tuple[int, int, int]]
    examples: list[list[int]]


def parse_sidecar(content: bytes) -> Sidecar:
    """A sidecar from its file's bytes; ValueError, TypeError or KeyError if they are damaged."""
    fields = unseal(content)
    fields["shapes"] = [tuple(shape) for shape in fields["shapes"]]
    return Sidecar(**fields)


def read_sidecar(folder: Path, unit: int) -> Sidecar | None:
    """The sidecar of a finished unit whose tar is whole; None if the unit must (again) be worked on."""
    try:
        sidecar = parse_sidecar((folder / sidecar_name(unit)).read_bytes())
        complete = not sidecar.records or (folder / shard_name(unit)).stat().st_size == sidecar.size
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CacheError(
            f"{folder / sidecar_name(unit)} is damaged ({error}); delete it and build again"
        ) from error
    return sidecar if complete else None


def write_unit(
    folder: Path,
    unit: int,
    clips: Sequence[tuple[EncodedClip, Sequence[int]]],
    *,
    embeddings: Embeddings,
    dropped: int,
    made_with: dict[str, str],
) -> None:
    """Write a unit's tar and sidecar; each clip comes with the numbers of its sentences."""
    shapes: list[tuple[int, int, int]] = []
    examples: list[list[int]] = []
    size, sha256, text_dim = 0, "", 0
    if clips:
        with whole_file(folder / shard_name(unit)) as file:
            writer = ShardWriter(file)
            for encoded, numbers in clips:
                meta, tensors = record(encoded, numbers, embeddings=embeddings)
                place = writer.add(encoded.clip.key, meta=meta, tensors=tensors)
                width, height = encoded.clip.geometry.size
                shape = (len(encoded.clip.frame_ids), height, width)
                if shape not in shapes:
                    shapes.append(shape)
                examples += example_rows(meta, tensors, place, unit=unit, shape=shapes.index(shape))
                text_dim = tensors["text.0"].shape[-1]
            size, sha256 = writer.close()
    sidecar = Sidecar(unit, len(clips), dropped, size, sha256, text_dim, made_with, shapes, examples)
    write_file(folder / sidecar_name(unit), seal(asdict(sidecar)))


def record(
    encoded: EncodedClip, numbers: Sequence[int], *, embeddings: Embeddings
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON and tensors of one record; masks and sentences are numbered anew where some were dropped."""
    clip = encoded.clip
    tensors = {"video.mean": encoded.video_mean, "video.logvar": encoded.video_logvar}
    masks = []
    for j, (place, mean) in enumerate(sorted(encoded.mask_means.items())):
        tensors[f"mask.{j}.mean"] = mean
        frames = [rle.encode(frame) for frame in encoded.mask_pixels[place]]
        masks.append({"j": j, "anno_ids": clip.masks[place], "rle": frames})
    new_place = {place: j for j, place in enumerate(sorted(encoded.mask_means))}
    text_ids: dict[int, int] = {}
    expressions = []
    for sentence, number in zip(clip.sentences, numbers, strict=True):
        if sentence.mask not in new_place:
            continue
        k = text_ids.setdefault(number, len(text_ids))
        expressions.append(
            {"exp_id": sentence.exp_id, "text": sentence.text, "mask": new_place[sentence.mask], "text_id": k}
        )
        tensors[f"text.{k}"] = embeddings[number][LONG_TEXT]
        if SHORT_TEXT in embeddings[number]:
            tensors[f"text.{k}.t{SHORT_TEXT}"] = embeddings[number][SHORT_TEXT]
    return {**clip_facts(clip), "masks": masks, "expressions": expressions}, tensors


def example_rows(
    meta: dict[str, Any], tensors: Mapping[str, Tensor], place: RecordPlace, *, unit: int, shape: int
) -> list[list[int]]:
    """One row of a sidecar for each expression of a record; `shape` is a place in the sidecar's shapes."""
    rows = []
    for number, expression in enumerate(meta["expressions"]):
        text, short = f"text.{expression['text_id']}", f"text.{expression['text_id']}.t{SHORT_TEXT}"
        row = {
            "video_mean": place.tensors["video.mean"][0],
            "video_logvar": place.tensors["video.logvar"][0],
            "mask_mean": place.tensors[f"mask.{expression['mask']}.mean"][0],
            "text": place.tensors[text][0],
            "text_tokens": tensors[text].shape[0],
            "short_text": place.tensors[short][0] if short in tensors else 0,
            "short_text_tokens": tensors[short].shape[0] if short in tensors else 0,
            "record": place.json[0],
            "record_length": place.json[1],
            "shard": unit,
            "view": meta["view"],
            "mask": expression["mask"],
            "expression": number,
        }
        rows.append([shape, *(row[name] for name in COLUMNS)])
    return rows
