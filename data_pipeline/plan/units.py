"""The plan of a build on disk: its clips and sentences, divided into units of work.

Written once, clip by clip, and read unit by unit, so that memory does not grow with the dataset. A clip
unit has the clips of one shard, all of one view; a text unit is a run of distinct sentences. plan.json is
written last.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from flowmask.data_pipeline.cache import quarantine
from flowmask.data_pipeline.cache.manifest import FILE as MANIFEST
from flowmask.data_pipeline.cache.manifest import FOLDER_KIND, Fingerprint
from flowmask.data_pipeline.cache.quarantine import Line
from flowmask.data_pipeline.cache.shards import FOLDER as SHARDS
from flowmask.data_pipeline.cache.shards import cache_file, remove_leftovers, write_file
from flowmask.data_pipeline.clip.clips import Clip, clips_of
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.plan.cost import ViewCost
from flowmask.data_pipeline.plan.plan_file import FOLDER, SENTENCES_PER_UNIT, PlanFile, read_plan_file
from flowmask.data_pipeline.sources.base import Video, VideoSet
from flowmask.models.errors import CacheError, DataError
from flowmask.models.files import read_object, sha256_of
from flowmask.models.folders.output_folder import Kind
from flowmask.models.stored.sealed import parse_json, seal, to_json

# Files next to plan.json, which has their hashes.
FILES = ("clips.jsonl", "clips.npy", "texts.jsonl", "texts.npy", quarantine.FILE)
_PLANNED = TypeAdapter(tuple[Clip, tuple[int, ...]])


class _Lines:
    """Lines of a file, with the byte offset of each unit's first line."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.offsets: list[int] = []
        self.count = 0

    def add(self, line: bytes, *, starts_unit: bool) -> None:
        if starts_unit:
            self.offsets.append(self._file.tell())
        self._file.write(line + b"\n")
        self.count += 1


class _Numbering:
    """Numbers distinct sentences in the order of their first appearance; holds hashes, not sentences."""

    def __init__(self, lines: _Lines):
        self._lines = lines
        self._numbers: dict[bytes, int] = {}

    def number(self, text: str) -> int:
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == self._lines.count:
            self._lines.add(to_json(text), starts_unit=number % SENTENCES_PER_UNIT == 0)
        return number


def write_plan(
    folder: Path, source: VideoSet, *, config: CacheBuildConfig, fingerprint: Fingerprint, facts: dict[str, Any]
) -> None:
    """Write the plan of a build into `folder`; plan.json keeps `facts` for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    with cache_file(folder / "clips.jsonl") as clips_file, cache_file(folder / "texts.jsonl") as texts_file:
        clips, texts = _Lines(clips_file), _Lines(texts_file)
        numbering = _Numbering(texts)
        costs = [ViewCost() for _ in range(config.cache.views)]
        losses = _Losses(roots=[Path(data.root) for data in config.sources])
        for view, cost in enumerate(costs):
            for number, clip in enumerate(_view_clips(source, view=view, config=config, losses=losses)):
                texts_of_clip = tuple(numbering.number(sentence.text) for sentence in clip.sentences)
                line = _PLANNED.dump_json((clip, texts_of_clip))
                clips.add(line, starts_unit=number % config.cache.clips_per_shard == 0)
                cost.add(clip, texts_of_clip)
        losses.refuse_too_many(
            clips=clips.count, views=config.cache.views, fraction=config.cache.max_quarantined_fraction
        )
    write_file(folder / quarantine.FILE, quarantine.to_bytes(losses.videos.values()))
    for name, lines in (("clips", clips), ("texts", texts)):
        with cache_file(folder / f"{name}.npy") as file:
            np.save(file, np.asarray(lines.offsets, dtype="<u8"))
    plan = {
        "files": {name: sha256_of(folder / name) for name in FILES},
        "fingerprint": fingerprint.model_dump(),
        "clips": clips.count,
        "texts": texts.count,
        "costs": [asdict(cost) for cost in costs],
        "facts": {**facts, "unreadable_videos": len(losses.videos)},
    }
    write_file(folder / "plan.json", seal(plan))


class _Losses:
    """Inputs known to be unreadable before the build reads any: videos without a header, clips without a frame."""

    def __init__(self, *, roots: Sequence[Path]):
        self._roots = roots
        self.videos: dict[int, Line] = {}  # by index in the source
        self._clips: list[Line] = []

    def has_header(self, video: Video, index: int, *, view: int) -> bool:
        """Whether the number and size of a video's frames can be read; checked in the first view, valid for all."""
        if view == 0 and video.expressions and video.has_masks:
            try:
                _ = video.frame_names, video.size
            except DataError as error:
                self.videos[index] = quarantine.line(error, video_id=video.label, clip=None, roots=self._roots)
        return index not in self.videos

    def look_at(self, clip: Clip, video: Video) -> None:
        """Note a clip with a missing file; too many of them are refused here, before the build has spent time."""
        if missing := video.missing_file(clip.frame_ids):
            error = DataError(f"{missing}: the file is missing")
            self._clips.append(quarantine.line(error, video_id=clip.label, clip=clip.key, roots=self._roots))

    def refuse_too_many(self, *, clips: int, views: int, fraction: float) -> None:
        unplanned = views * len(self.videos)
        lost, total = unplanned + len(self._clips), clips + unplanned
        if lost > fraction * total:
            example = [*self.videos.values(), *self._clips][0]
            raise quarantine.too_many(lost, of=total, fraction=fraction, example=example)


def _view_clips(source: VideoSet, *, view: int, config: CacheBuildConfig, losses: _Losses) -> Iterator[Clip]:
    number = 0
    for index, video in enumerate(source.videos()):
        if not losses.has_header(video, index, view=view):
            continue
        for clip in clips_of(
            video, index=index, first_number=number, view=view, clip=config.clip_of(video.source), cache=config.cache
        ):
            if any(not sentence.text for sentence in clip.sentences):
                raise DataError(f"{video} has a sentence that is empty after cleaning; remove it")
            losses.look_at(clip, video)
            number += 1
            yield clip


@dataclass(frozen=True)
class BuildPlan(PlanFile):
    """A written plan; units are read from disk on request.

    clip_offsets, text_offsets: uint64 [units], the first byte of each unit in clips.jsonl and texts.jsonl
    """

    folder: Path
    clip_offsets: NDArray[np.uint64]
    text_offsets: NDArray[np.uint64]

    @property
    def clip_units(self) -> int:
        return len(self.clip_offsets)

    @property
    def text_units(self) -> int:
        return len(self.text_offsets)

    def unit_clips(self, unit: int) -> list[tuple[Clip, tuple[int, ...]]]:
        """Clips of one shard, each with its sentences' numbers among the distinct sentences of the build."""
        return [_PLANNED.validate_json(line) for line in self._lines("clips.jsonl", self.clip_offsets, unit)]

    def unit_texts(self, unit: int) -> list[str]:
        """Sentences of a text unit."""
        return [parse_json(line) for line in self._lines("texts.jsonl", self.text_offsets, unit)]

    def refuse_changed(self) -> None:
        """CacheError if a file of the plan was changed after writing: units read from it may be wrong."""
        for name, expected in self.files.items():
            if sha256_of(self.folder / name) != expected:
                raise CacheError(
                    f"{self.folder / name}: changed since the build was planned, so its shards can't be trusted; "
                    f"delete {self.folder.parent} and start again"
                )

    def _lines(self, name: str, offsets: NDArray[np.uint64], unit: int) -> list[bytes]:
        start = int(offsets[unit])
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            end = int(offsets[unit + 1]) if unit + 1 < len(offsets) else None
            return file.read(-1 if end is None else end - start).splitlines()


def read_plan(folder: Path) -> BuildPlan | None:
    """The plan in a folder, None if there is none yet; CacheError if it is damaged."""
    path = folder / "plan.json"
    if not path.exists():
        return None
    try:
        return BuildPlan(
            **vars(read_plan_file(path)),
            folder=folder,
            clip_offsets=np.load(folder / "clips.npy", mmap_mode="r"),
            text_offsets=np.load(folder / "texts.npy", mmap_mode="r"),
        )
    except (OSError, ValueError, EOFError) as error:
        raise CacheError(
            f"{folder}: the plan of the build is damaged ({error}); delete {folder.parent} and start again"
        ) from error


def _older(out: Path) -> tuple[()] | None:
    """Whether a cache, finished or not, is of an earlier version."""
    if "fingerprint" in read_object(out / MANIFEST) or "fingerprint" in read_object(out / FOLDER / "plan.json"):
        return ()
    known = {
        FOLDER: "|".join(map(re.escape, FILES)),
        SHARDS: r"\d{6}\.(tar|json)",
        "work": r"claims|texts|quarantine|weights\.json|repair",
    }
    for entry in out.iterdir():
        inside = known.get(entry.name)
        if inside is None and not entry.name.startswith((".", "launch", "slurm")):
            return None
        if inside and not all(re.fullmatch(rf"{inside}|\.tmp-.*", path.name) for path in _entries(entry)):
            return None
    return ()


def _entries(folder: Path) -> list[Path]:
    """The names in a folder; empty if its path is a file."""
    return list(folder.iterdir()) if folder.is_dir() else [folder]


# Builds of one config have equal bytes, so their marks are equal too.
CACHE = Kind(FOLDER_KIND, older=_older, error=CacheError, identity="c" * 32)
