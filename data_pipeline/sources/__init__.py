"""Dataset layouts by name: a new one is one file here and one line below."""

from collections.abc import Callable
from pathlib import Path

from data_pipeline.config import DataSourceConfig
from data_pipeline.sources.base import Source
from models.errors import ConfigError


def _mevis(root: Path, split: str) -> Source:
    from data_pipeline.sources.mevis import MevisSource

    return MevisSource(root, split=split)


def _videos(root: Path, split: str) -> Source:
    from data_pipeline.sources.videos import VideosSource

    return VideosSource(root, split=split)


def _ref_youtube_vos(root: Path, split: str) -> Source:
    from data_pipeline.sources.ref_youtube_vos import RefYoutubeVosSource

    return RefYoutubeVosSource(root, split=split)


def _ref_davis17(root: Path, split: str) -> Source:
    from data_pipeline.sources.ref_davis17 import RefDavis17Source

    return RefDavis17Source(root, split=split)


def _refcoco(root: Path, split: str) -> Source:
    from data_pipeline.sources.refcoco import RefcocoSource

    return RefcocoSource(root, split=split)


SOURCES: dict[str, Callable[[Path, str], Source]] = {
    "mevis": _mevis,
    "ref_davis17": _ref_davis17,
    "ref_youtube_vos": _ref_youtube_vos,
    "refcoco": _refcoco,
    "synthetic": _mevis,  # written in the layout of MeViS
    "videos": _videos,
}


def open_source(config: DataSourceConfig) -> Source:
    """The source that a config names; ConfigError lists the known ones, DataError says what is wrong."""
    if config.source not in SOURCES:
        raise ConfigError(f"data.source is {config.source!r}; known sources: {', '.join(sorted(SOURCES))}")
    return SOURCES[config.source](config.root, config.split)
