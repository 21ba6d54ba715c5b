"""Several datasets as one: their videos concatenated, each with the name of its dataset.

A video is identified by (name of the dataset, id), so two datasets may use the same id. The identity
contains each dataset's identity under its name.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from flowmask.data_pipeline.sources.base import LazyVideos, Video, VideoSet


class NamedSources(VideoSet):
    """Datasets by name; their order gives the clips their numbers."""

    def __init__(self, sources: Mapping[str, VideoSet]):
        self._sources = dict(sources)
        self._videos = _NamedVideos({name: source.videos() for name, source in self._sources.items()})

    def videos(self) -> Sequence[Video]:
        return self._videos

    def identity(self) -> dict[str, str]:
        return {
            f"{what}.{name}": digest
            for name, source in self._sources.items()
            for what, digest in source.identity().items()
        }


class _NamedVideos(LazyVideos[Video]):
    """The videos of all datasets, each read from its dataset on request; none is held here."""

    def __init__(self, videos: Mapping[str, Sequence[Video]]):
        self._videos = list(videos.items())
        self._ends = list(accumulate(len(each) for each in videos.values()))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, place: int) -> Video:
        dataset = bisect_right(self._ends, place)
        name, videos = self._videos[dataset]
        video = videos[place - self._ends[dataset]]  # a negative index, from the end
        video.source = name
        return video
