"""Under which names an evaluation keeps the masks of a dataset's videos and expressions, and their scores."""

from collections.abc import Sequence

from flowmask.data_pipeline.formats.names import file_names
from flowmask.data_pipeline.sources.base import Video


class MaskNames:
    """File names of the ids of a dataset: the ids themselves, unless some file system would not keep them apart."""

    def __init__(self, videos: Sequence[Video]) -> None:
        self._videos = file_names(video.video_id for video in videos)

    def video(self, video: Video) -> str:
        return self._videos[video.video_id]

    def keys(self, video: Video) -> dict[str, str]:
        """`<video>/<expression>` of each expression id: a folder below masks/, and a key of scores.json."""
        names = file_names(expression.exp_id for expression in video.expressions)
        return {exp_id: f"{self.video(video)}/{name}" for exp_id, name in names.items()}
