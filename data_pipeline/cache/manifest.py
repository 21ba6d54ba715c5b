"""manifest.json: what a finished cache is. Written last, so a folder without it is not a cache.

Holds no time, path or number of workers: the same inputs give the same bytes. Refuses another schema and
anything that does not parse.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.models.errors import CacheError

FILE = "manifest.json"
# Tokens that a sentence is cut to; it is stored at both where it is longer than the first.
SHORT_TEXT, LONG_TEXT = 64, 256
RARE = frozenset({"no_target", "partly_annotated"})  # counts that are left out of files where they are 0


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Part):
    """Hashes of what determines the bytes; `fields` are the single values, for messages that name one."""

    total: str
    text: str
    video: str
    masks: str
    fields: dict[str, Any]


class FileEntry(_Part):
    """One file of the cache."""

    file: str
    size: int
    sha256: str


class ShardEntry(FileEntry):
    """One tar file; `made_with` is a place in the manifest's `environments`.

    All its clips are of one view; `examples[b]` is how many examples of bucket b it has, which is what reading
    it as a stream needs to know beforehand.
    """

    records: int
    made_with: int
    view: int = 0
    examples: list[int] = []


class BucketEntry(_Part):
    """Clips of one shape, in pixels; `first[v]` and `examples[v]` are its example ids in view v."""

    frames: int
    height: int
    width: int
    first: list[int]
    examples: list[int]

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """f, h, w."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def counts(self) -> Bucket:
        return Bucket(self.name, tuple(self.first), tuple(self.examples))


class LeakEntry(_Part):
    """How a cache was kept apart from evaluation: which splits were looked into, and what was left out."""

    setting: Literal["refuse", "drop", "allow"]
    checked: list[str]
    unreadable: list[str]
    dropped_videos: int


class Manifest(_Part):
    """Everything that a reader must know; see the module's docstring."""

    schema_version: Literal[1] = 1
    fingerprint: Fingerprint
    dtype: Literal["bfloat16", "float32"]
    views: int
    latent_channels: int
    latents_mean: list[float]
    latents_std: list[float]
    text_dim: int
    longest_text_tokens: int
    pixel_norm: Literal["half", "imagenet"]
    lowercase: bool
    clips: int
    examples: int
    dropped_empty_masks: int
    quarantined_clips: int = 0  # planned, but not readable: see quarantine.jsonl
    role: Literal["train", "evaluation"] = "train"
    leaks: LeakEntry | None = None
    unreadable_videos: int = 0  # of which no clip could be planned
    no_target: int = 0  # examples whose sentence names nothing: their target is the empty mask
    partly_annotated: int = 0  # examples of which some frames are not annotated: they count in no loss and no score
    buckets: list[BucketEntry]
    index: FileEntry
    environments: list[dict[str, str]]
    shards: list[ShardEntry]

    def to_bytes(self) -> bytes:
        none = {name for name in RARE if not getattr(self, name)}
        return self.model_dump_json(indent=1, exclude=none).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache; CacheError says what to do when there is none."""
    path = folder / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if not folder.is_dir():
            raise CacheError(f"{folder}: no such cache folder; make one with `flowmask cache build`") from None
        raise CacheError(
            f"{folder} has no {FILE}: its build has not finished; run `flowmask cache build` (again)"
        ) from None
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error}") from error
    return parse_manifest(content, where=path)


def parse_manifest(content: bytes, *, where: Path | str) -> Manifest:
    """The manifest from its file's content; `where` is for messages."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise CacheError(
            f"{where}: damaged or written by another version of flowmask ({field}: {first['msg']}); "
            "build the cache again into another folder"
        ) from error
