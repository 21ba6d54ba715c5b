"""Reading, models and judges at work at once: the same records, each work done once, errors in order."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protocol_videos import HeldVideo
from torch import Tensor

from flowmask.data_pipeline.clip.vae_clip import VaeClip
from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.sources.base import Expression, Video
from flowmask.models.errors import DataError
from flowmask.trainer.predict.presence import Presence
from flowmask.trainer.predict.windows.cut import TimeWindow, WindowConfig
from flowmask.trainer.score.mask_places import MaskMemory
from flowmask.trainer.score.one_video import OneVideo, VideoSettings, evaluate_video
from flowmask.trainer.score.pipeline import evaluate_videos

SIZE, FRAMES = (20, 30), 6
TEXTS = ("the dog", "the cat", "the dog", "a bird", "the cat", "two birds")


class Shown(HeldVideo):
    """A video of `TEXTS` whose frames are noise."""

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        masks = {str(i): rng.random((FRAMES, *SIZE)) > 0.5 for i in range(3)}
        sentences = [Expression(str(i), text, (str(i % 3),)) for i, text in enumerate(TEXTS)]
        super().__init__(f"v{number}", masks, dict.fromkeys(sentences, np.zeros((FRAMES, *SIZE))))
        self.pixels = rng.integers(0, 256, (FRAMES, *SIZE, 3), dtype=np.uint8)

    def frames(self, ids: Sequence[int]) -> list[Any]:
        return [self.pixels[i] for i in ids]


class Fake:
    """Replaces the models: logits are a function of pixels and sentence. It counts its calls."""

    box, pixel_norm = FrameBox(height_px=16, width_px=32, size_multiple=16), "half"

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def encode(self, clip: VaeClip) -> Tensor:
        self.asked["encode"] += 1
        return torch.cat(list(clip.pieces()), dim=2).mean(1)[0]

    def logits(self, video_latent: Tensor, sentences: Sequence[str]) -> Iterator[Tensor]:
        for sentence in sentences:
            self.asked[sentence] += 1
            yield video_latent * len(sentence) - 1

    def round_trip(self, masks: Any) -> Tensor:
        self.asked["round trip"] += 1
        return torch.from_numpy(masks).float() - 0.5


WHOLE, CUT = WindowConfig(), WindowConfig(frames=5, overlap=0)


class Kept(dict[str, dict[str, MaskMemory]]):
    """The masks of each video by expression."""

    def __init__(self, window: WindowConfig = WHOLE, chosen: Presence | None = None) -> None:
        self.settings = VideoSettings(shuffled_text=True, decoder_score=True, window=window)
        self.chosen = chosen

    def start(self, video: Video) -> OneVideo:
        places = self[video.video_id] = {e.exp_id: MaskMemory() for e in video.expressions}
        return OneVideo(self.settings, video, places, labels=Path("no labels here"), chosen=self.chosen)

    def bits(self) -> dict[tuple[str, str, str], bytes]:
        return {
            (video, exp_id, frame): place.read(frame).tobytes()
            for video, places in self.items()
            for exp_id, place in places.items()
            for frame in place._known
        }


def overlapped(videos: Sequence[Video], kept: Kept, *, waiting: int = 2, fake: Any = None) -> list[Any]:
    with closing(evaluate_videos(fake or Fake(), videos, kept.start, waiting=waiting)) as records:
        return list(records)


@pytest.mark.parametrize("window", [WHOLE, CUT])
@pytest.mark.parametrize("waiting", [1, 2, 5])
def test_at_once_gives_the_records_and_masks_of_one_after_another(waiting: int, window: WindowConfig) -> None:
    videos, one_by_one, at_once = [Shown(i) for i in range(4)], Kept(window), Kept(window)
    wanted = [(video, evaluate_video(Fake(), one_by_one.start(video))) for video in videos]
    found = overlapped(videos, at_once, waiting=waiting)
    assert repr(found) == repr(wanted) and at_once.bits() == one_by_one.bits()
    assert len(at_once.bits()) == len(videos) * len(TEXTS) * FRAMES
    assert {"right", "wrong", "decoder"} <= found[0][1]["expressions"]["0"].keys()


def without_presence(found: list[Any]) -> list[Any]:
    """The records without their presences, which are means over pieces; and the presences."""
    numbers = [entry.pop("presence") for _, record in found for entry in record["expressions"].values()]
    return [repr(found), numbers]


@pytest.mark.parametrize("at_least", [None, 0.0, 0.5, 0.9])
def test_windows_of_frames_that_do_not_see_each_other_give_the_records_and_masks_of_the_whole(
    at_least: float | None,
) -> None:
    """at_least: the share of presences below the threshold."""
    videos, whole = [Shown(i) for i in range(3)], Kept()
    _, numbers = without_presence(overlapped(videos, whole))
    chosen = None
    if at_least is not None:
        threshold = float(np.quantile(numbers, at_least)) + 1e-3
        chosen = Presence.model_construct(rule="", threshold=threshold)
    whole, cut = Kept(WHOLE, chosen), Kept(CUT, chosen)
    (wanted, numbers), (found, others) = (without_presence(overlapped(videos, kept)) for kept in (whole, cut))
    assert found == wanted and others == pytest.approx(numbers, abs=1e-6) and cut.bits() == whole.bits()
    assert chosen is None or "'answered': False" in found


def test_a_video_is_read_and_encoded_once_and_each_of_its_sentences_sampled_once() -> None:
    read: Counter[str] = Counter()

    class Counted(Shown):
        def frames(self, ids: Sequence[int]) -> list[Any]:
            read.update(f"{self.video_id}/{i}" for i in ids)
            return super().frames(ids)

    fake = Fake()
    overlapped([Counted(0), Counted(1)], Kept(), fake=fake)
    assert set(read.values()) == {1} and len(read) == 2 * FRAMES
    assert fake.asked == {"encode": 2, "round trip": 2 * 3, **dict.fromkeys(TEXTS, 2)}


class _Failing(Shown):
    """Raises an error with its number in the given stage."""

    def __init__(self, number: int, *, read: bool = False, judge: bool = False) -> None:
        super().__init__(number)
        self._read, self._judge = read, judge

    def frames(self, ids: Sequence[int]) -> list[Any]:
        if self._read:
            raise DataError(f"{self.video_id}: no frame")
        return super().frames(ids)

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> Any:
        if self._judge and threading.current_thread() is not threading.main_thread():
            raise DataError(f"{self.video_id}: no mask")
        return super().mask(anno_ids, ids)


@pytest.mark.parametrize(
    ("videos", "whole", "message"),
    [
        (lambda: [_Failing(0, read=True), Shown(1)], 0, "v0: no frame"),
        (lambda: [Shown(0), _Failing(1, read=True), Shown(2)], 1, "v1: no frame"),
        (lambda: [Shown(0), _Failing(1, judge=True), Shown(2)], 1, "v1: no mask"),
        (lambda: [Shown(0), Shown(1), _Failing(2, judge=True)], 2, "v2: no mask"),
        (lambda: [Shown(0), _Failing(1, judge=True), _Failing(2, read=True)], 1, "v1: no mask"),
    ],
)
def test_the_error_of_a_video_comes_behind_the_records_of_those_before_it_and_ends_all_threads(
    videos: Callable[[], list[Video]], whole: int, message: str
) -> None:
    threads, found = threading.active_count(), []
    with (
        pytest.raises(DataError, match=f"^{message}$"),
        closing(evaluate_videos(Fake(), videos(), Kept().start, waiting=2)) as records,
    ):
        for video, _ in records:
            found.append(video.video_id)
    assert found == [f"v{i}" for i in range(whole)] and threading.active_count() == threads


def test_whoever_stops_waiting_leaves_no_thread_and_starts_no_video_that_is_not_next() -> None:
    threads, kept = threading.active_count(), Kept()
    with closing(evaluate_videos(Fake(), [Shown(i) for i in range(9)], kept.start, waiting=2)) as records:
        next(records)
    assert threading.active_count() == threads and len(kept) <= 3


def test_two_clips_are_in_memory_at_the_most() -> None:
    alive, most = set[int](), []
    lock = threading.Lock()

    class Watched(Fake):
        def encode(self, clip: VaeClip) -> Tensor:
            with lock:
                alive.remove(id(clip))
            return super().encode(clip)

    class Reading(OneVideo):
        def read(self, loaded: Any) -> Iterator[tuple[TimeWindow, VaeClip]]:
            for window, clip in super().read(loaded):
                with lock:
                    alive.add(id(clip))
                    most.append(len(alive))
                yield window, clip

    def start(video: Video) -> OneVideo:
        return Reading(VideoSettings(), video, {e.exp_id: MaskMemory() for e in video.expressions}, labels=Path("none"))

    with closing(evaluate_videos(Watched(), [Shown(i) for i in range(6)], start, waiting=2)) as records:
        assert len(list(records)) == 6
    assert max(most) <= 2
