"""Dataset layouts by name: each is one file, here or in an installed package, and needs no other change.

A layout has the name of its file; the file has one subclass of `Source`. An installed package names such a
class in an entry point of the group `flowmask.sources`; a file here has priority over an entry point of the same name.
Imports `formats`, `video` and `models`.
"""

from collections.abc import Sequence

from flowmask.data_pipeline.config import CacheSourceConfig, DataSourceConfig, source_names
from flowmask.data_pipeline.sources.base import Source, VideoSet
from flowmask.data_pipeline.sources.named import NamedSources
from flowmask.data_pipeline.sources.videos import FileVideo
from flowmask.models.errors import ConfigError
from flowmask.models.plugins.registry import Registry

SOURCES = Registry(__name__, Source, group="flowmask.sources", key="data.source")  # type: ignore[type-abstract]


def open_source(data: DataSourceConfig | Sequence[CacheSourceConfig]) -> VideoSet:
    """The source of a config, or several as one, where each video has the name of its dataset.

    Raises ConfigError that lists the known sources, or DataError for an invalid dataset.
    """
    if not isinstance(data, DataSourceConfig):
        names = source_names(data)
        opened = [_open(entry) for entry in data]
        return opened[0] if names == [""] else NamedSources(dict(zip(names, opened, strict=True)))
    if isinstance(data, CacheSourceConfig) and data.name:
        return NamedSources({data.name: _open(data)})
    return _open(data)


def _open(data: DataSourceConfig) -> Source:
    source = SOURCES.get(data.source)(data.root, split=data.split)
    if data.allow_truncated:
        files = [video for video in source.videos() if isinstance(video, FileVideo)]
        if not files:
            raise ConfigError(f"data.allow_truncated is set, but {data.source} has no video files; remove it")
        for video in files:
            video.allow_truncated = True
    return source
