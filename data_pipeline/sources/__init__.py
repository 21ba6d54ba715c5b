"""Dataset layouts by name: a new one is one file here and one line below."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig, source_names
from flowmask.data_pipeline.sources.base import Source
from flowmask.data_pipeline.sources.named import NamedSources
from flowmask.models.errors import ConfigError


def _mevis(root: Path, split: str) -> Source:
    from flowmask.data_pipeline.sources.mevis import MevisSource

    return MevisSource(root, split=split)


def _videos(root: Path, split: str) -> Source:
    from flowmask.data_pipeline.sources.videos import VideosSource

    return VideosSource(root, split=split)


def _ref_youtube_vos(root: Path, split: str) -> Source:
    from flowmask.data_pipeline.sources.ref_youtube_vos import RefYoutubeVosSource

    return RefYoutubeVosSource(root, split=split)


def _ref_davis17(root: Path, split: str) -> Source:
    from flowmask.data_pipeline.sources.ref_davis17 import RefDavis17Source

    return RefDavis17Source(root, split=split)


def _refcoco(root: Path, split: str) -> Source:
    from flowmask.data_pipeline.sources.refcoco import RefcocoSource

    return RefcocoSource(root, split=split)


SOURCES: dict[str, Callable[[Path, str], Source]] = {
    "mevis": _mevis,
    "ref_davis17": _ref_davis17,
    "ref_youtube_vos": _ref_youtube_vos,
    "refcoco": _refcoco,
    "synthetic": _mevis,  # written in the layout of MeViS
    "videos": _videos,
}


def open_source(data: DataSourceConfig | Sequence[CacheSourceConfig]) -> Source:
    """The source that a config names, or several as one, each video with the name of its dataset.

    ConfigError lists the known sources, DataError says what is wrong with one.
    """
    if not isinstance(data, DataSourceConfig):
        names = source_names(data)
        opened = [_open(entry) for entry in data]
        return opened[0] if names == [""] else NamedSources(dict(zip(names, opened, strict=True)))
    if isinstance(data, CacheSourceConfig) and data.name:
        return NamedSources({data.name: _open(data)})
    return _open(data)


def _open(data: DataSourceConfig) -> Source:
    if data.source not in SOURCES:
        raise ConfigError(f"data.source is {data.source!r}; known sources: {', '.join(sorted(SOURCES))}")
    return SOURCES[data.source](data.root, data.split)
