"""Several datasets as one: their videos end to end, each with the name of its dataset.

A video is known by (name of the dataset, id), so two datasets may use one id. Each dataset keeps an
identity of its own, under its name.
"""

from collections.abc import Mapping, Sequence

from data_pipeline.sources.base import Source, Video


class NamedSources(Source):
    """Datasets by name, in the order that numbers their clips."""

    def __init__(self, sources: Mapping[str, Source]):
        self._sources = dict(sources)
        self._videos: list[Video] = []
        for name, source in self._sources.items():
            for video in source.videos():
                video.source = name
                self._videos.append(video)

    def videos(self) -> Sequence[Video]:
        return self._videos

    def identity(self) -> dict[str, str]:
        return {
            f"{what}.{name}": digest
            for name, source in self._sources.items()
            for what, digest in source.identity().items()
        }
