"""Videos one after another into their records, with everything that takes time at work at once.

    reading thread     the frames of the next video, resized
    calling thread     the models: encodes a video, samples its sentences, decodes their masks
    judging threads    masks of the sentences before: resized, written, scored

Records and errors come in the order of the videos. In memory are two clips, and the logits of `waiting` sentences
beside those that are worked on.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.predict.inference import VaeClip
from flowmask.trainer.score.one_video import OneVideo, Record, VideoSegmenter

_JUDGES = 2  # each holds a few frames of its sentence at the size of the video
_Read = Future[tuple[OneVideo, VaeClip]]


def evaluate_videos(
    loaded: VideoSegmenter, videos: Sequence[Video], start: Callable[[Video], OneVideo], *, waiting: int
) -> Generator[tuple[Video, Record], None, None]:
    """Each video with its record, once all of its masks are written; close it, or its threads go on.

    start: makes a place for a video's masks; called once for each, by the reading thread
    waiting: sentences of a video whose masks may wait to be written before the models wait too
    """
    reader, judges = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(_JUDGES, "judge")
    before: list[tuple[Video, Future[Record]]] = []  # the video before, which may still be judged
    try:
        for video, read in _read_ahead(reader, loaded, videos, start):
            try:
                record = _begun(judges, loaded, *read.result(), waiting=waiting)
            except Exception:  # an earlier video's record, or error, comes first
                yield from _whole(before)
                raise
            yield from _whole(before)
            before = [(video, judges.submit(record))]
        yield from _whole(before)
    finally:
        for pool in (reader, judges):
            pool.shutdown(cancel_futures=True)


def _read_ahead(
    reader: ThreadPoolExecutor, loaded: VideoSegmenter, videos: Sequence[Video], start: Callable[[Video], OneVideo]
) -> Iterator[tuple[Video, _Read]]:
    """Each video while the next one is read."""

    def read(video: Video) -> tuple[OneVideo, VaeClip]:
        one = start(video)
        return one, one.read(loaded)

    ahead: deque[tuple[Video, _Read]] = deque()
    for video in videos:
        ahead.append((video, reader.submit(read, video)))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def _begun(
    judges: ThreadPoolExecutor, loaded: VideoSegmenter, one: OneVideo, clip: VaeClip, *, waiting: int
) -> Callable[[], Record]:
    """Does a video's work for the models, leaves the rest to the judges; what waits for them and gives the record."""
    video_latent, sizes = loaded.encode(clip), clip.without_pixels()
    answers: list[Future[None]] = []
    for expression, logits in one.sentences(loaded, video_latent):
        answers.append(judges.submit(one.answer, expression, logits, sizes))
        if len(answers) > waiting:
            answers[-1 - waiting].result()
    one.decode_truth(loaded, sizes)

    def record() -> Record:
        for answer in answers:
            answer.result()
        return one.record()

    return record


def _whole(before: Sequence[tuple[Video, Future[Record]]]) -> Iterator[tuple[Video, Record]]:
    for video, record in before:
        yield video, record.result()
