"""Encoded clips to one shard (.tar) and its sidecar (.json), which together are one finished unit.

The sidecar is written after the tar and says what the tar holds and where. The index is made from sidecars only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmask.data_pipeline.build.stage_clock import StageClock
from flowmask.data_pipeline.cache.index import COLUMNS
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, RARE, SHORT_TEXT, Count
from flowmask.data_pipeline.cache.quarantine import Line
from flowmask.data_pipeline.cache.shards import (
    RecordPlace,
    ShardWriter,
    cache_file,
    shard_name,
    sidecar_name,
    write_file,
)
from flowmask.data_pipeline.clip.clips import clip_facts
from flowmask.models.errors import CacheError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import seal, unseal
from flowmask.models.stored.typed import validated

if TYPE_CHECKING:
    from torch import Tensor

    from flowmask.data_pipeline.build.encode import EncodedClip
    from flowmask.data_pipeline.build.sentences import Embeddings

Shape = tuple[int, int, int]
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Sidecar:
    """A finished unit. If all its masks were empty, it has no records and no tar: `size` is 0.

    shapes[i] is (F, H, W) in px; examples hold an index into `shapes`, then the index's COLUMNS.
    """

    unit: Count
    records: Count
    dropped_empty_masks: Count
    size: Count
    sha256: str
    text_dim: Count
    made_with: dict[str, str]
    shapes: list[Shape]
    examples: list[list[Count]]
    quarantined: list[Line] = field(default_factory=list)
    no_target: int = 0  # examples whose sentence names nothing
    partly_annotated: int = 0  # examples of which some frames are not annotated

    def to_bytes(self) -> bytes:
        """Sealed; some counts are written only if they are not 0, so older sidecars have the same bytes."""
        fields = asdict(self)
        return seal({k: v for k, v in fields.items() if v or k not in RARE})


def parse_sidecar(content: bytes) -> Sidecar:
    """A sidecar from its file's bytes; ValueError if they are damaged."""
    sidecar = validated(unseal(content), Sidecar)
    if any(len(row) != 1 + len(COLUMNS) or row[0] >= len(sidecar.shapes) for row in sidecar.examples):
        raise ValueError("a row of an example is not one of the index's")
    return sidecar


def read_sidecar(folder: Path, unit: int) -> Sidecar | None:
    """The sidecar of a finished unit with a complete tar; None if the unit must be made (again)."""
    try:
        sidecar = parse_sidecar(read_regular(folder / sidecar_name(unit), limit=_MOST_BYTES))
        complete = not sidecar.records or (folder / shard_name(unit)).stat().st_size == sidecar.size
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CacheError(f"{folder / sidecar_name(unit)} is damaged ({error}); delete it and build again") from error
    return sidecar if complete else None


def write_unit(
    folder: Path,
    unit: int,
    clips: "Iterator[tuple[EncodedClip, Sequence[int]]]",
    *,
    embeddings: "Embeddings",
    outcome: Callable[[], tuple[int, list[Line]]],
    made_with: dict[str, str],
    clock: StageClock,
) -> None:
    """Write a unit's tar while its clips arrive, then its sidecar; each clip comes with its sentence numbers.

    outcome: called after the last clip: the number of dropped empty masks, and the lines of unreadable clips.
    """
    rows = Rows()
    size, sha256 = 0, ""
    first = next(clips, None)
    if first is not None:
        with cache_file(folder / shard_name(unit)) as file:
            writer = ShardWriter(file)
            for encoded, numbers in chain([first], clips):
                with clock.measure("write"):
                    meta, tensors = record(encoded, numbers, embeddings=embeddings.of(sorted(set(numbers))))
                    place = writer.add(encoded.clip.key, meta=meta, tensors=tensors)
                    rows.add(meta, tensors, place, unit=unit)
            with clock.measure("write"):
                size, sha256 = writer.close()
    dropped, lost = outcome()
    sidecar = rows.sidecar(
        unit=unit, size=size, sha256=sha256, dropped_empty_masks=dropped, quarantined=lost, made_with=made_with
    )
    with clock.measure("write"):
        write_file(folder / sidecar_name(unit), sidecar.to_bytes())


@dataclass
class Rows:
    """Counts and rows for a shard's sidecar, gathered record by record."""

    records: int = 0
    masks: int = 0
    text_dim: int = 0
    no_target: int = 0
    partly_annotated: int = 0
    shapes: list[Shape] = field(default_factory=list)
    examples: list[list[int]] = field(default_factory=list)

    def add(self, meta: Mapping[str, Any], tensors: "Mapping[str, Tensor]", place: RecordPlace, *, unit: int) -> None:
        """Note a written record; of its tensors, only the shapes of the texts [L D] are read."""
        width, height = meta["size"]
        shape = (len(meta["frame_ids"]), height, width)
        if shape not in self.shapes:
            self.shapes.append(shape)
        self.examples += example_rows(meta, tensors, place, unit=unit, shape=self.shapes.index(shape))
        self.text_dim = tensors["text.0"].shape[-1]
        self.records += 1
        self.masks += len(meta["masks"])
        meant = [meta["masks"][expression["mask"]] for expression in meta["expressions"]]
        self.no_target += sum(not mask["anno_ids"] for mask in meant)
        self.partly_annotated += sum("annotated" in mask for mask in meant)

    def sidecar(self, **rest: Any) -> Sidecar:
        """The sidecar; `rest` are the fields that do not come from a shard."""
        return Sidecar(**{name: value for name, value in vars(self).items() if name != "masks"}, **rest)


def record(
    encoded: "EncodedClip", numbers: Sequence[int], *, embeddings: "Mapping[int, Mapping[int, Tensor]]"
) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """JSON and tensors of one record; masks and sentences are numbered without the dropped ones.

    embeddings: [L D] by sentence number and token limit
    returns: the JSON; video.mean, video.logvar, mask.<j>.mean [16 f h w] raw, and text.<k> [L D], in the stored dtype
    """
    clip = encoded.clip
    tensors = {"video.mean": encoded.video_mean, "video.logvar": encoded.video_logvar}
    masks = []
    for j, (place, mean) in enumerate(sorted(encoded.mask_means.items())):
        tensors[f"mask.{j}.mean"] = mean
        known = {"annotated": encoded.annotated[place]} if place in encoded.annotated else {}
        masks.append({"j": j, "anno_ids": clip.masks[place], "rle": encoded.mask_rles[place], **known})
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
    meta: Mapping[str, Any], tensors: "Mapping[str, Tensor]", place: RecordPlace, *, unit: int, shape: int
) -> list[list[int]]:
    """One row of a sidecar for each expression of a record.

    tensors: of the record; only the shapes of the texts [L D] are read
    shape:   index in the sidecar's list of shapes
    """
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
