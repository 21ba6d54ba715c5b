"""manifest.json: describes a finished cache. Written last, so a folder without it is not a cache.

Holds no time, path or number of workers: the same inputs give the same bytes. Sealed since schema 2. Types, ranges and
the agreement of counts are checked, so readers may rely on all values. Another schema and invalid content are
refused.
"""

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowmask.data_pipeline.cache.buckets import Bucket
from flowmask.models.errors import CacheError
from flowmask.models.folders.output_folder import kind_in
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_object, seal_readable, unseal_since

FILE = "manifest.json"
FOLDER_KIND = "a cache"  # mark of the folder, from the start of its build
SEALED_FROM = 2  # schema
_SHARD = r"^[0-9]{6,18}\.tar$"  # no other name in the file is used as a path
MOST_BYTES = 1 << 30  # of a manifest; a million shards need a quarter of it
# Tokens to which a sentence is cut; a sentence longer than the first is stored at both lengths.
SHORT_TEXT, LONG_TEXT = 64, 256
RARE = frozenset({"no_target", "partly_annotated"})  # counts that are not written if they are 0


Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]
Some = Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]
Flag = Annotated[bool, Field(strict=True)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fingerprint(_Part):
    """Hashes of everything that determines the bytes; `fields`: the single values, for messages."""

    total: str
    text: str
    video: str
    masks: str
    fields: dict[str, Any]


class FileEntry(_Part):
    """One file of the cache."""

    file: str
    size: Count
    sha256: Hash


class IndexEntry(FileEntry):
    """The index of the cache."""

    file: Literal["index.npy"] = "index.npy"


class ShardEntry(FileEntry):
    """One tar file; `made_with` is an index in the manifest's `environments`.

    All its clips have one view; `examples[b]` is its number of examples of bucket b, which streaming needs in advance.
    """

    file: Annotated[str, Field(pattern=_SHARD)]
    records: Count
    made_with: Count
    view: Count = 0
    examples: list[Count] = []


class BucketEntry(_Part):
    """Clips of one shape, in pixels; `first[v]` and `examples[v]` are its example ids in view v."""

    frames: Some
    height: Annotated[Some, Field(multiple_of=8)]
    width: Annotated[Some, Field(multiple_of=8)]
    first: list[Count]
    examples: list[Count]

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
    """The check for leaks from evaluation: the compared splits, and the dropped videos."""

    setting: Literal["refuse", "drop", "allow"]
    checked: list[str]
    unreadable: list[str]
    dropped_videos: Count


class Manifest(_Part):
    """All facts that a reader needs; see the module's docstring."""

    schema_version: Literal[1, 2] = 2
    fingerprint: Fingerprint
    dtype: Literal["bfloat16", "float32"]
    views: Some
    latent_channels: Some
    latents_mean: list[Finite]
    latents_std: list[Annotated[Finite, Field(gt=0)]]
    text_dim: Some
    longest_text_tokens: Annotated[Count, Field(lt=1 << 16)]
    pixel_norm: Literal["half", "imagenet"]
    lowercase: Flag
    clips: Count
    examples: Count
    dropped_empty_masks: Count
    quarantined_clips: Count = 0  # planned but unreadable clips, see quarantine.jsonl
    role: Literal["train", "evaluation"] = "train"
    leaks: LeakEntry | None = None
    unreadable_videos: Count = 0  # videos without a planned clip
    no_target: Count = 0  # examples whose sentence names nothing; their target is the empty mask
    partly_annotated: Count = 0  # examples with unannotated frames, which count in no loss and no score
    buckets: list[BucketEntry]
    index: IndexEntry
    environments: list[dict[str, str]]
    shards: list[ShardEntry]

    def to_bytes(self) -> bytes:
        none = {name for name in RARE if not getattr(self, name)}
        return seal_readable(self.model_dump(mode="json", exclude=none))

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Check that counts agree with each other, and that tensors are not larger than the shards."""
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(f"{name} has not latent_channels = {self.latent_channels} numbers")
        if any(len(bucket.first) != self.views or len(bucket.examples) != self.views for bucket in self.buckets):
            raise ValueError(f"a bucket has not views = {self.views} counts")
        counts = [count for bucket in self.buckets for count in bucket.examples]
        firsts = [first for bucket in self.buckets for first in bucket.first]
        if [*firsts, self.examples] != list(accumulate(counts, initial=0)):
            raise ValueError("examples are not the concatenated examples of the buckets")
        for shard in self.shards:
            if shard.made_with >= len(self.environments) or shard.view >= self.views:
                raise ValueError(f"{shard.file} has a view or an environment that does not exist")
            if len(shard.examples) not in (0, len(self.buckets)) or sum(shard.examples) > shard.size:
                raise ValueError(f"{shard.file} can't have examples = {str(shard.examples)[:80]}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        self._refuse_larger_than_shards()
        return self

    def _refuse_larger_than_shards(self) -> None:
        largest = max((shard.size for shard in self.shards), default=0) // (4 if self.dtype == "float32" else 2)
        for bucket in self.buckets:
            f, h, w = bucket.latent_shape
            if self.shards and self.latent_channels * f * h * w > largest:
                raise ValueError(f"a latent of {bucket.name} is larger than every shard")
        if self.shards and self.longest_text_tokens * self.text_dim > largest:
            raise ValueError("a text of longest_text_tokens x text_dim is larger than every shard")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache; raises CacheError with the fix if there is none."""
    path = folder / FILE
    try:
        content = read_regular(path, limit=MOST_BYTES, inside=folder)
    except FileNotFoundError:
        if not folder.is_dir():
            raise CacheError(f"{folder}: no such cache folder; make one with `flowmask cache build`") from None
        raise CacheError(f"{folder} {_why_no_manifest(folder)}") from None
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_manifest(content, where=path)


def _why_no_manifest(folder: Path) -> str:
    kind = kind_in(folder)
    if kind == FOLDER_KIND or (not kind and (folder / "plan").is_dir()):
        return f"has no {FILE}: its build has not finished; run `flowmask cache build` (again)"
    return f"is {kind or 'no cache'}{', not a cache' if kind else ''}; give the `out` of a `flowmask cache build`"


def parse_manifest(content: bytes, *, where: Path | str) -> Manifest:
    """The manifest from its file's content; `where` is for messages."""
    try:
        document = unseal_since(parse_object(content), version="schema_version", first=SEALED_FROM, where=where)
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(str(part) for part in first["loc"]), first["msg"])))
    except ValueError as error:
        reason = str(error)
    raise CacheError(
        f"{where}: damaged or written by another version of flowmask ({reason}); "
        "build the cache again into another folder"
    )
