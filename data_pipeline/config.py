"""Config sections of the data pipeline: the dataset, its clips, the cache, and its loading in training.

Rules that need no file are checked here; messages give the value and the nearest valid one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from flowmask.models.config import MayChange, Section, Tf32
from flowmask.models.process import DEFAULT_LEASE_S
from flowmask.models.safe.secrets import masked_uri


class DataSourceConfig(Section):
    """Which raw dataset to read."""

    source: str = Field("mevis", description="layout: a file in data_pipeline/sources, or an installed one")
    root: Path = Field(description="folder of the dataset (`videos`: the JSONL file)")
    split: str = Field(
        "train", description="split under `root`; for refcoco SET/BY/SPLIT, for example refcoco/unc/train"
    )
    allow_truncated: bool = Field(
        False, description="use the readable frames of video files that are cut short; false: refuse such files"
    )


class CacheSourceConfig(DataSourceConfig):
    """One of the datasets of a cache."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9+_-]+$",
        description="its name in records and fingerprint; default: `source`, if there are several datasets",
    )
    frames: int | None = Field(None, ge=1, description="frames of its sparse clips; default: clip.frames")

    @model_validator(mode="after")
    def _frames_fit(self) -> Self:
        if self.frames is not None:
            _check_frames(self.frames)
        return self


def _check_multiple(size_multiple: int) -> None:
    if size_multiple % 16:
        raise ValueError(f"size_multiple is {size_multiple}; it must be a multiple of 16 (VAE 8 x patch 2)")


def _check_frames(frames: int) -> None:
    if frames % 4 != 1:
        low = (frames - 1) // 4 * 4 + 1
        raise ValueError(f"frames is {frames}; it must be 4k + 1. Nearest: {low} or {low + 4}")


def _one_or_several(value: Any) -> Any:
    """Parsed here and not by a union: a union's errors name branches that are not in the file."""
    if isinstance(value, list | tuple):
        return TypeAdapter(Annotated[tuple[CacheSourceConfig, ...], Field(min_length=1)]).validate_python(value)
    return CacheSourceConfig.model_validate(value)


def source_names(sources: Sequence[CacheSourceConfig]) -> list[str]:
    """The name of each dataset in records and fingerprint; "" for a single dataset without a name."""
    return [data.name or ("" if len(sources) == 1 else data.source) for data in sources]


class ClipConfig(Section):
    """How a video is cut into clips, and how each frame is resized and augmented."""

    sampling: Literal["sparse", "whole"] = Field("sparse", description="sparse frames, or all")
    frames: int = Field(17, ge=1, description="frames of a sparse clip: 4k + 1, as the VAE requires")
    short_side: int = Field(480, ge=16, description="short side in px before flooring")
    long_side: int = Field(832, ge=16, description="largest long side in px")
    size_multiple: int = Field(32, ge=16, description="both sides are floored to a multiple of this many px")
    augment: bool = Field(True, description="random resize, crop and flip, once for each clip and view")
    crop_probability: float = Field(0.5, ge=0, le=1, description="probability of a random crop, if `augment` is on")
    crop_short_sides: tuple[int, ...] = Field(
        (400, 500, 600), min_length=1, description="short sides before a crop, in px"
    )
    crop_min: int = Field(384, ge=16, description="smallest crop side in px")
    crop_max: int = Field(600, ge=16, description="largest crop side in px")
    flip_probability: float = Field(
        0.5, ge=0, le=1, description="probability of a mirrored clip; the words left and right are swapped too"
    )

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        _check_frames(self.frames)
        _check_multiple(self.size_multiple)
        if self.short_side > self.long_side:
            raise ValueError(f"short_side {self.short_side} is larger than long_side {self.long_side}")
        if self.short_side < self.size_multiple:
            raise ValueError(f"short_side {self.short_side} is smaller than size_multiple {self.size_multiple}")
        if self.crop_min > self.crop_max:
            raise ValueError(f"crop_min {self.crop_min} is larger than crop_max {self.crop_max}")
        return self


class FrameBox(Section):
    """A frame is resized to fit into the box, with its aspect ratio; sides are floored to the multiple."""

    height_px: int = Field(480, ge=16, description="height of the box")
    width_px: int = Field(832, ge=16, description="width of the box")
    size_multiple: int = Field(
        16,
        ge=16,
        description="both sides are floored to a multiple of this many px: 16 (VAE 8 x patch 2) or a multiple of 16",
    )

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        _check_multiple(self.size_multiple)
        for name, side in (("height_px", self.height_px), ("width_px", self.width_px)):
            if side < self.size_multiple:
                raise ValueError(f"{name} is {side}, smaller than size_multiple {self.size_multiple}")
        return self


class CacheConfig(Section):
    """The contents of a cache, and how they are packed."""

    clips_per_shard: int = Field(64, ge=1, description="clips in one shard; a shard is one unit of the build's work")
    views: int = Field(1, ge=1, le=1024, description="augmented versions of a clip; epoch e uses e mod views")
    seed: int = Field(0, ge=0, description="seed of the choice of frames, crops and flips")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of stored latents and embeddings")
    encoder_dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the encoders")
    tf32: Tf32 = None
    drop_empty_masks: bool = Field(True, description="drop expressions whose object is not in the clip")
    no_target: Literal["keep", "drop"] = Field(
        "keep", description="sentences that name nothing in their video: keep (with an empty mask as target) or drop"
    )
    lowercase: bool = Field(True, description="lower-case sentences before encoding")
    pixel_norm: Literal["half", "imagenet"] = Field(
        "half",
        description="half: [-1, 1]; imagenet: normalised by ImageNet's mean and deviation, as for weights of 2025",
    )
    batch_clips: int = Field(4, ge=1, description="clips of one shape in one batch of the VAE")
    batch_sentences: int = Field(
        1, ge=1, description="sentences of equally many tokens in one batch of the text encoder"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    decode_threads: int = Field(4, ge=1, description="threads of a worker for reading and resizing")
    max_quarantined_fraction: float = Field(
        0.01, ge=0, le=1, description="largest share of unreadable clips before the build stops"
    )
    leaks: Literal["refuse", "drop", "allow"] = Field(
        "refuse", description="videos that are also in an evaluation split: refuse the build, drop them, or allow them"
    )
    held_out: tuple[DataSourceConfig, ...] = Field((), description="further evaluation splits, for `leaks`")
    lease_s: float = Field(
        DEFAULT_LEASE_S, ge=1, description="seconds without a heartbeat after which another worker takes over the shard"
    )


class CacheModel(Section):
    """The frozen encoders."""

    wan: Path = Field(description="Wan2.1 folder in the diffusers layout")


class CacheBuildConfig(Section):
    """The complete config of a cache build."""

    out: Path = Field(description="a new folder, or the one of this cache, whose build then continues")
    model: CacheModel
    data: Annotated[CacheSourceConfig | tuple[CacheSourceConfig, ...], BeforeValidator(_one_or_several)] = Field(
        description="one dataset, or a list of them"
    )
    clip: ClipConfig = ClipConfig()
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = source_names(self.sources)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"data lists two datasets called {twice!r}; give each a different `name`")
        return self

    @property
    def sources(self) -> Sequence[CacheSourceConfig]:
        return self.data if isinstance(self.data, tuple) else (self.data,)

    def clip_of(self, source: str) -> ClipConfig:
        """The clip settings for the dataset called `source`."""
        frames = self.sources[source_names(self.sources).index(source)].frames
        return self.clip if frames is None else self.clip.model_copy(update={"frames": frames})


def folder_or_url(value: Any) -> Any:
    """A path, or a URL (or `pipe:` command) unchanged."""
    is_url = isinstance(value, str) and ("://" in value or value.startswith("pipe:"))
    return value if is_url or not isinstance(value, str) else Path(value)


CachePlace = Annotated[Path | str, BeforeValidator(folder_or_url)]  # str: a URL
_OBJECTS = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.+=@-]+)*/?")


def refuse_other_url(url: str, *, key: str) -> None:
    """Raises ValueError for a URL that is not a folder in an object store."""
    if _OBJECTS.fullmatch(url) is None:
        raise ValueError(
            f"{key} is {masked_uri(url)}; give a folder or s3://BUCKET/PATH (credentials come from the environment); "
            "data.mode=stream reads one data.cache at another URL"
        )


class MixConfig(Section):
    """One of the caches that a run trains on."""

    cache: CachePlace = Field(description="folder that `flowmask cache build` finished, or its s3:// URL")
    weight: float = Field(1.0, gt=0, description="share of the steps, relative to the other caches")


class LoaderConfig(Section):
    """How training reads one or several caches. Only `remainder` and weights affect the contents of batches."""

    cache: MayChange[CachePlace | None] = Field(
        None, description="folder that `flowmask cache build` finished, or its s3:// URL; in mode stream any URL"
    )
    mode: Literal["indexed", "stream"] = Field(
        "indexed",
        description="indexed: examples in any order; stream: shards front to back, see docs/decisions/streaming.md",
    )
    shuffle_examples: int = Field(256, ge=1, description="stream: size of a rank's shuffle buffer")
    retries: MayChange[int] = Field(3, ge=0, le=10, description="stream: retries of a shard; s3://: of a request")
    mix: MayChange[tuple[MixConfig, ...]] = Field((), description="several caches with weights, in place of `cache`")
    local_cache: MayChange[Path | None] = Field(
        None, description="s3://: folder on a disk of each node for data that was read; see docs/object-stores.md"
    )
    local_cache_gib: MayChange[float] = Field(50.0, gt=0, description="largest size of data.local_cache on each node")
    remainder: Literal["carry", "drop"] = Field(
        "carry", description="examples that do not fill an epoch's last batch: carry over to the next epoch, or drop"
    )
    threads: MayChange[int] = Field(2, ge=0, description="reading threads; 0 reads in the training thread")
    prefetch_batches: MayChange[int] = Field(4, ge=1, description="global batches read ahead")

    @model_validator(mode="after")
    def _cache_or_mix(self) -> Self:
        if self.mode == "stream" and self.mix:
            raise ValueError("data.mode is stream, which reads one data.cache; data.mix needs data.mode=indexed")
        if self.mode == "stream" and self.remainder == "drop":
            raise ValueError("data.remainder is drop; data.mode=stream needs data.remainder=carry")
        if self.cache is not None and self.mix:
            raise ValueError("data.cache and data.mix are both given; give one: a cache, or a list of caches")
        if self.cache is None and not self.mix:
            raise ValueError(
                "key data.cache is missing; set it, or data.mix to a list of {cache: FOLDER, weight: NUMBER}"
            )
        return self

    @model_validator(mode="after")
    def _urls_can_be_indexed(self) -> Self:
        if self.mode == "indexed":
            for place in self.places:
                self.refuse_url(place, key="data.mix.cache" if self.mix else "data.cache")
        return self

    def refuse_url(self, place: Path | str | None, *, key: str) -> None:
        """Raises ValueError for a URL that can't be read by index, or that needs other keys of this config."""
        if not isinstance(place, str):
            return
        refuse_other_url(place, key=key)
        if self.local_cache is None:
            raise ValueError(
                f"{key} is {place}, which needs data.local_cache: a folder on a disk of each node for read data, "
                "of data.local_cache_gib"
            )

    @property
    def places(self) -> list[Path | str]:
        """Every named cache, in order."""
        named: list[Path | str | None] = [entry.cache for entry in self.mix] or [self.cache]
        return [place for place in named if place is not None]

    @property
    def asks_a_server(self) -> bool:
        """Whether a cache is not in a folder. Only the run itself connects to servers."""
        return any(isinstance(place, str) for place in self.places)

    def folders(self) -> list[Path]:
        """The caches that are folders here, in their order; without URLs and `pipe:` commands."""
        return [place for place in self.places if isinstance(place, Path)]

    @property
    def caches(self) -> str:
        """All caches, for messages: the folder or URL, or the folders with their weights."""
        mixed = ", ".join(f"{entry.cache} (weight {entry.weight:g})" for entry in self.mix)
        return mixed or str(self.cache)
