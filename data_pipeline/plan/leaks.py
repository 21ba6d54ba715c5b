"""Keeps videos and images of evaluation splits out of training caches.

Compares with the evaluation splits of each cached dataset (for RefCOCO all three sets, by COCO image id) and
those of `cache.held_out`, using only their lists of ids. `cache.leaks` decides whether a video of such a split is
refused or dropped. A cache with only evaluation splits is allowed.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flowmask.data_pipeline.cache.manifest import LeakEntry, Manifest
from flowmask.data_pipeline.config import CacheBuildConfig, DataSourceConfig, source_names
from flowmask.data_pipeline.read.reader import CacheReader, damaged_record
from flowmask.data_pipeline.sources import SOURCES
from flowmask.data_pipeline.sources.base import LazyVideos, Video, VideoSet
from flowmask.models.errors import CacheError, DataError

_SHOWN, _READING_THREADS = 4, 16


@dataclass
class Held:
    """Videos that must not be in training data: family of datasets and video id -> split."""

    in_family: dict[tuple[str, str], str] = field(default_factory=dict)
    anywhere: dict[str, str] = field(default_factory=dict)  # of cache.held_out, for any dataset
    checked: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def split_of(self, family: str, video_id: str) -> str | None:
        return self.in_family.get((family, video_id)) or self.anywhere.get(video_id)


class LeakFree(VideoSet):
    """A source without the leaking videos; `facts` go to the manifest."""

    def __init__(self, source: VideoSet, videos: Sequence[Video], facts: dict[str, Any]):
        self._source, self._videos, self.facts = source, videos, facts

    def videos(self) -> Sequence[Video]:
        return self._videos

    def identity(self) -> dict[str, str]:
        return self._source.identity()


class _Kept(LazyVideos[Video]):
    """Some of the videos of a source; each is read from it on request."""

    def __init__(self, videos: Sequence[Video], places: Sequence[int]):
        self._videos, self._places = videos, places

    def __len__(self) -> int:
        return len(self._places)

    def at(self, place: int) -> Video:
        return self._videos[self._places[place]]


def without_leaks(source: VideoSet, config: CacheBuildConfig) -> LeakFree:
    """The source without leaking videos. Raises DataError with their number and the fix.

    A damaged list of an evaluation split is a DataError too; a missing list is not.
    """
    setting = config.cache.leaks
    role = "evaluation" if all(map(_evaluates, config.sources)) else "train"
    if setting == "allow":
        role = "train"  # cache.leaks=allow means training data
    held = Held() if role == "evaluation" or setting == "allow" else held_out(config)
    families = dict(zip(source_names(config.sources), map(family_of, config.sources), strict=True))
    kept, leaking, sentences = array("q"), [], False  # indices: a source need not hold all videos
    for place, video in enumerate(source.videos()):
        split = held.split_of(families[video.source], video.video_id)
        if split is None:
            kept.append(place)
            sentences = sentences or bool(video.expressions)
        elif video.expressions:
            leaking.append(f"{video.video_id} ({split})")
    if leaking and setting == "refuse":
        raise DataError(_refusal(leaking, total=len(source.videos())))
    if leaking and not sentences:
        raise DataError(f"{_refusal(leaking, total=len(source.videos()))}; nothing would be left")
    entry = LeakEntry(setting=setting, checked=held.checked, unreadable=held.unreadable, dropped_videos=len(leaking))
    videos = _Kept(source.videos(), kept) if leaking else source.videos()
    return LeakFree(source, videos, {"role": role, "leaks": entry.model_dump()})


def held_out(config: CacheBuildConfig) -> Held:
    """All videos of the datasets' evaluation splits and of `cache.held_out`."""
    held = Held()
    for data, label in zip(config.sources, _labels(config), strict=True):
        for split, ids in _beside(data):
            held.in_family |= {(family_of(data), video_id): label + split for video_id in ids or ()}
            (held.unreadable if ids is None else held.checked).append(label + split)
    for other in config.cache.held_out:
        layout = SOURCES.get(other.source, key="cache.held_out.source")
        ids = layout.split_ids(other.root, other.split)
        if ids is None:
            raise DataError(f"cache.held_out names {other.split} of {other.root}, which has no such split")
        held.anywhere |= dict.fromkeys(ids, f"{other.source}:{other.split}")
        held.checked.append(f"{other.source}:{other.split}")
    held.checked = sorted(set(held.checked))
    held.unreadable = sorted(set(held.unreadable))
    return held


def refuse_evaluation(manifests: Iterable[Manifest], *, where: object) -> None:
    """Raises CacheError if a cache has evaluation splits, which must not be used for training."""
    if any(manifest.role == "evaluation" for manifest in manifests):
        raise CacheError(
            f"{where} is a cache of evaluation splits, which training must not use: build one of a training split, "
            "or, if it is intended, build it with cache.leaks=allow"
        )


def refuse_trained_on(videos: Iterable[Video], data: DataSourceConfig, caches: Iterable[CacheReader]) -> None:
    """DataError if a training cache has a clip of one of these videos of `data`; reads all records.

    A cache of one dataset does not name its layout, so its ids are compared with every layout's.
    """
    names = {video.video_id for video in videos}
    for cache in caches:
        both = sorted(video_id for source, video_id in _cached(cache) if video_id in names and _alike(source, data))
        if both:
            raise DataError(
                f"{len(both)} of the {len(names)} videos are in the training cache {cache.place}: "
                f"{', '.join(both[:_SHOWN])}{', ...' if len(both) > _SHOWN else ''}; give a held-out split, or "
                "build the cache with cache.held_out and cache.leaks=drop"
            )


def _cached(cache: CacheReader) -> set[tuple[str, str]]:
    """(name of the dataset, "" if it has none; video id) of every clip of a cache."""
    firsts = np.flatnonzero(cache.index["view"] == 0)  # other views have the same videos
    _, places = np.unique(cache.index[firsts][["shard", "record"]], return_index=True)
    with ThreadPoolExecutor(_READING_THREADS) as pool:  # a shared filesystem answers many requests at once
        records = pool.map(cache.record, firsts[places].tolist())
        with damaged_record(cache.place):
            return {(str(record.get("source", "")), str(record["video_id"])) for record in records}


def _alike(source: str, data: DataSourceConfig) -> bool:
    """Whether equal ids may mean equal videos in `data` and in a dataset that a cache calls `source`."""
    return source not in SOURCES.names() or (SOURCES.get(source).family or source) == family_of(data)


def _labels(config: CacheBuildConfig) -> Iterator[str]:
    return (f"{name}:" if name else "" for name in source_names(config.sources))


def _beside(data: DataSourceConfig) -> Iterator[tuple[str, frozenset[str] | None]]:
    layout = SOURCES.get(data.source)
    for split in layout.evaluation_splits(data.root, split=data.split):
        yield split, layout.split_ids(data.root, split)


def _evaluates(data: DataSourceConfig) -> bool:
    return SOURCES.get(data.source).is_scored(data.root, data.split)


def family_of(data: DataSourceConfig) -> str:
    """The datasets in which equal ids mean equal videos."""
    return SOURCES.get(data.source).family or data.source


def _refusal(leaking: Sequence[str], *, total: int) -> str:
    more = ", ..." if len(leaking) > _SHOWN else ""
    return (
        f"{len(leaking)} of {total} videos are in an evaluation split too: {', '.join(leaking[:_SHOWN])}{more}; leave "
        "them out with cache.leaks=drop, or train on them with cache.leaks=allow"
    )
