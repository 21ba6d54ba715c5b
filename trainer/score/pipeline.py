"""Videos one after another into their records, with all slow stages running in parallel.

    reading thread     the frames of the next window, resized: of this video or of the next one
    calling thread     the models: encodes a window, samples its sentences, decodes their masks
    judging threads    masks of earlier sentences: resized, written, scored

Records and errors come in the order of the videos. Memory holds the clips of two windows, the logits of `waiting`
sentences in addition to the current ones, and for each sentence the logits of frames shared by two windows.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.sources.base import Video
from flowmask.trainer.predict.windows.cut import TimeWindow
from flowmask.trainer.score.one_video import OneVideo, Record, VideoSegmenter

_JUDGES = 2  # each holds a few frames of its sentence at the size of the video
_Read = tuple[OneVideo, TimeWindow, VaeClip]


def evaluate_videos(
    loaded: VideoSegmenter, videos: Sequence[Video], start: Callable[[Video], OneVideo], *, waiting: int
) -> Generator[tuple[Video, Record], None, None]:
    """Each video with its record, once all of its masks are written; close the iterator to end its threads.

    start: makes a place for a video's masks; called once for each, by the reading thread
    waiting: sentences of a video whose masks may wait for writing before the models have to wait
    """
    reader, judges = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(_JUDGES, "judge")
    before: list[tuple[Video, Future[Record]]] = []  # the previous video, which may still be in judging
    answers: list[Future[None]] = []
    try:
        for read in _read_ahead(reader, _windows(loaded, videos, start)):
            try:
                if (found := read.result()) is None:
                    break
                one, window = found[:2]
                answers = _answered(judges, loaded, *found, answers, waiting=waiting)
                del found, read  # its clip, before the next one is read
            except Exception:  # an earlier video's record, or error, comes first
                yield from _whole(before)
                raise
            yield from _whole(before)
            before = []
            if window.is_last:
                before, answers = [(one.video, judges.submit(_record, one, answers))], []
        yield from _whole(before)
    finally:
        for pool in (reader, judges):
            pool.shutdown(cancel_futures=True)


def _windows(loaded: VideoSegmenter, videos: Sequence[Video], start: Callable[[Video], OneVideo]) -> Iterator[_Read]:
    for video in videos:
        one = start(video)
        for window, clip in one.read(loaded):
            yield one, window, clip


def _read_ahead(reader: ThreadPoolExecutor, windows: Iterator[_Read]) -> Iterator[Future[_Read | None]]:
    """Each window while the next one is read; None after the last."""
    ahead = reader.submit(next, windows, None)
    while True:
        now, ahead = ahead, reader.submit(next, windows, None)
        yield now


def _answered(
    judges: ThreadPoolExecutor,
    loaded: VideoSegmenter,
    one: OneVideo,
    window: TimeWindow,
    clip: VaeClip,
    earlier: Sequence[Future[None]],
    *,
    waiting: int,
) -> list[Future[None]]:
    """Run the models on a window, and queue the rest for the judges; `earlier`: answers of the previous window."""
    video_latent, sizes = loaded.encode(clip), clip.without_pixels()
    answers: list[Future[None]] = []
    for answer in earlier:
        answer.result()
    for expression, logits in one.sentences(loaded, video_latent):
        answers.append(judges.submit(one.answer, expression, logits, sizes, window=window))
        if len(answers) > waiting:
            answers[-1 - waiting].result()
    if window.is_last:
        one.decode_truth(loaded, sizes)
    return answers


def _record(one: OneVideo, answers: Sequence[Future[None]]) -> Record:
    for answer in answers:
        answer.result()
    return one.record()


def _whole(before: Sequence[tuple[Video, Future[Record]]]) -> Iterator[tuple[Video, Record]]:
    for video, record in before:
        yield video, record.result()
