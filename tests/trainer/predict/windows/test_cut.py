"""Videos of any length: windows are cut and blended, and memory for one window is enough."""

import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_export import write_golden_export
from PIL import Image
from torch import Tensor
from trials import SEED, TRIALS

from flowmask.data_pipeline.clip.vae_clip import VaeClip, read_clip
from flowmask.data_pipeline.config import FrameBox
from flowmask.models.errors import ConfigError
from flowmask.models.text import RecentTexts, TextEncoder
from flowmask.trainer.predict import inference
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.predict.predict import Predictions, predict
from flowmask.trainer.predict.windows.clips import Blend, window_clips
from flowmask.trainer.predict.windows.cut import LONGEST, TimeWindow, WindowConfig, cut, window_for

DRAWS = 200 * TRIALS

PROMPTS = ["the dog running to the left", "a bird"]


def drawn() -> list[tuple[int, WindowConfig]]:
    """Videos and windows of all kinds, also the smallest."""
    random, found = np.random.default_rng(SEED), [(1, WindowConfig()), (6, WindowConfig(frames=5, overlap=0))]
    for _ in range(DRAWS):
        frames = int(4 * random.integers(1, 12) + 1)
        window = WindowConfig(frames=frames, overlap=int(4 * random.integers(0, frames // 4)))
        found.append((int(random.integers(1, 200)), window))
    return found


def test_every_frame_is_final_in_one_window_and_windows_meet_at_latent_frames() -> None:
    for total, window in drawn():
        windows = cut(total, window)
        assert [i for one in windows for i in one.final] == list(range(total))
        assert sum(one.share for one in windows) == pytest.approx(1)
        assert [one.is_last for one in windows] == [False] * (len(windows) - 1) + [True]
        for one, after in pairwise(windows):
            assert one.frames[0] == one.final[0] and after.frames[0] % 4 == 0
            assert len(one.frames) == window.frames and one.frames.stop < after.frames.stop
            shared = len(range(after.frames.start, one.frames.stop))
            assert shared == window.overlap + 1 or (after.is_last and shared > window.overlap)
        if len(windows) > 1:
            assert len(windows[-1].frames) > (window.frames or 0) - 4, "the last one has as much context as the others"
        else:
            assert windows[0].frames == range(total)


def stitched(total: int, window: WindowConfig, logits: Callable[[TimeWindow], Tensor]) -> Tensor:
    blend = Blend()
    return torch.cat([blend.add(one, logits(one)) for one in cut(total, window)])


def test_windows_that_agree_are_blended_to_the_bit_and_one_window_is_the_whole() -> None:
    torch.manual_seed(SEED)
    for total, window in drawn():
        whole = torch.randn(total + 3, 2, 3)  # the last frames are padding
        found = stitched(total, window, lambda one, whole=whole: whole[one.frames.start : one.frames.stop + 3])
        assert torch.equal(found, whole[:total])


def test_the_weights_of_windows_sum_to_one_and_a_later_one_fades_in_evenly() -> None:
    for total, window in drawn():
        windows = cut(total, window)
        each = []
        for named in windows:
            own = stitched(
                total, window, lambda one, named=named: torch.full((len(one.frames), 1, 1), float(one == named))
            )
            each.append(own[:, 0, 0])
            alone = [i for i in range(total) if sum(i in one.frames for one in windows) == 1]
            assert all(own[i] == float(i in named.frames) for i in alone)
        assert torch.allclose(sum(each), torch.ones(total)) and min(map(torch.min, each)) >= 0
        for before, after, weight in zip(windows, windows[1:], each[1:]):
            shared = range(after.frames.start, before.frames.stop)
            if not any(other.frames.start in shared for other in windows if other != after):
                rising = weight[shared.start : shared.stop]
                assert torch.allclose(rising, torch.arange(len(shared)) / len(shared))


def test_between_windows_the_logits_of_shared_frames_alone_are_kept() -> None:
    blend, windows = Blend(), cut(50, WindowConfig(frames=17, overlap=4))
    for window in windows:
        blend.add(window, torch.zeros(len(window.frames), 2, 2))
        kept = blend._kept
        assert (kept is None) == window.is_last
        assert kept is None or kept.untyped_storage().nbytes() == 4 * 4 * (len(window.frames) - len(window.final))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"frames": 82}, r"window\.frames is 82; it must be 4k \+ 1, 5 to 4093\. Nearest: 81 or 85"),
        ({"frames": 80}, "Nearest: 77 or 81"),
        ({"frames": 0}, "Nearest: 5$"),
        ({"frames": 5000}, "Nearest: 4093$"),
        ({"frames": 21, "overlap": 6}, r"window\.overlap is 6; it must be a multiple of 4.* 0 to 16\. Nearest: 4 or 8"),
        ({"frames": 13, "overlap": 16}, "Nearest: 8$"),
        ({"overlap": -4}, "Nearest: 0$"),
    ],
)
def test_a_window_that_does_not_fit_is_one_line_with_the_nearest(given: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        WindowConfig(**given)


def test_only_a_long_video_is_cut_if_nothing_is_said_and_a_whole_one_may_be_too_long() -> None:
    none = WindowConfig()
    assert (window_for(121, none), window_for(122, none)) == (none, WindowConfig(frames=81, overlap=16))
    assert window_for(122, WindowConfig(overlap=4)) == WindowConfig(frames=81, overlap=4)
    assert window_for(9, WindowConfig(frames=5, overlap=0)).frames == 5
    assert len(cut(LONGEST, none)) == 1
    with pytest.raises(
        ConfigError, match=r"4094 frames is longer than the model's maximum 4093; set window\.frames=81"
    ):
        cut(LONGEST + 1, none)


class Film:
    """Frames of noise; it records the frames that were read."""

    size = (20, 36)

    def __init__(self) -> None:
        self.read: list[int] = []

    def frames(self, ids: Sequence[int]) -> list[Any]:
        self.read += ids
        return [np.random.default_rng(i).integers(0, 255, (*self.size, 3), np.uint8) for i in ids]


def test_the_clip_of_each_window_is_that_of_its_frames_and_every_frame_is_read_once() -> None:
    box, random = FrameBox(height_px=16, width_px=32), np.random.default_rng(SEED)
    for total, window in [drawn()[i] for i in random.integers(0, DRAWS, 12)]:
        film, windows = Film(), cut(total, window)
        for one, clip in window_clips(film, windows, box=box, pixel_norm="half"):
            wanted = read_clip(Film(), one.frames, box=box, pixel_norm="half")
            assert np.array_equal(clip.rgb8, wanted.rgb8) and clip.frames == wanted.frames == len(one.frames)
        assert film.read == list(range(total))


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def film_of(folder: Path, frames: int) -> Path:
    folder.mkdir()
    y, x = np.mgrid[:46, :70]
    for i in range(frames):
        shape = (y - 20) ** 2 + (x - 10 - 5 * i % 60) ** 2 < 80
        Image.fromarray(np.stack([200 * shape, 3 * x, 5 * y], -1).astype(np.uint8)).save(folder / f"{i:04d}.png")
    return folder


def _predict(golden: Path, video: Path, out: Path, **changes: Any) -> Predictions:
    return predict(video, PROMPTS, checkpoint=str(golden), out=out, precision="fp32", device="cpu", **changes)


def masks(made: Predictions) -> list[dict[str, bytes]]:
    return [{path.name: path.read_bytes() for path in one.masks.iterdir()} for one in made.prompts]


def test_one_window_predicts_the_bytes_of_the_whole_and_the_first_of_several_begins_as_if_it_were_it(
    golden: Path, tmp_path: Path
) -> None:
    video = film_of(tmp_path / "v", 11)
    whole = _predict(golden, video, tmp_path / "whole")
    one = _predict(golden, video, tmp_path / "one", window=WindowConfig(frames=13, overlap=8))
    assert masks(one) == masks(whole)
    assert [p.presence for p in one.prompts] == [p.presence for p in whole.prompts]
    several = _predict(golden, video, tmp_path / "several", window=WindowConfig(frames=5, overlap=0))
    first = _predict(golden, video, tmp_path / "first", max_frames=5)
    for cut_, alone in zip(masks(several), masks(first)):
        assert len(cut_) == 11 and alone.items() <= cut_.items()


def test_a_sentence_is_encoded_once_a_video_and_the_masks_are_those_of_encoding_it_for_each_window(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, embed = list[str](), TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, text, **of: made.append(text) or embed(self, text, **of))
    video, window = film_of(tmp_path / "v", 21), WindowConfig(frames=5, overlap=0)
    once = _predict(golden, video, tmp_path / "once", window=window)
    assert made == PROMPTS
    monkeypatch.setattr(inference, "RecentTexts", partial(RecentTexts, most_bytes=0))
    each = _predict(golden, video, tmp_path / "each", window=window)
    assert made[2:] == 5 * PROMPTS and masks(each) == masks(once)
    assert [p.presence for p in each.prompts] == [p.presence for p in once.prompts]


def test_a_long_video_is_cut_and_that_is_said(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowmask.trainer.predict.windows.cut.WHOLE_UP_TO", 9)
    monkeypatch.setattr("flowmask.trainer.predict.windows.cut.FRAMES", 9)
    video, said = film_of(tmp_path / "v", 14), list[str]()
    _predict(golden, video, tmp_path / "p", window=WindowConfig(overlap=4), say=said.append)
    assert [line for line in said if "windows" in line] == [
        "the video has 14 frames: 3 windows of 9 with overlap 4, since larger ones need more memory (--window-frames)"
    ]


def test_of_windows_that_are_finished_no_frame_and_no_logit_is_held(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, most = list[weakref.ref[Any]](), [0]
    encode, logits = LoadedSegmenter.encode, LoadedSegmenter.logits

    def note(tensor: Any) -> Any:
        seen.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(one() is not None for one in seen))
        return tensor

    def watched(self: LoadedSegmenter, clip: VaeClip) -> Tensor:
        note(clip.rgb8)
        return note(encode(self, clip))

    monkeypatch.setattr(LoadedSegmenter, "encode", watched)
    monkeypatch.setattr(LoadedSegmenter, "logits", lambda *given: map(note, logits(*given)))
    _predict(golden, film_of(tmp_path / "v", 21), tmp_path / "p", window=WindowConfig(frames=5, overlap=0))
    assert len(seen) == 5 * (2 + len(PROMPTS)) and most[0] <= 2 * (2 + len(PROMPTS))


PEAK = """
import resource, sys
from pathlib import Path
from flowmask.trainer.predict.predict import predict
from flowmask.trainer.predict.windows.cut import WindowConfig
golden, video, out, frames = sys.argv[1:]
predict(Path(video), ["a bird"], checkpoint=golden, out=Path(out), precision="fp32", device="cpu",
        max_frames=int(frames), window=WindowConfig(frames=13, overlap=4))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_thousand_frames_take_the_memory_of_one_window(golden: Path, tmp_path: Path) -> None:
    video = film_of(tmp_path / "v", 2000)

    def peak_mib(frames: int) -> float:
        command = [sys.executable, "-c", PEAK, str(golden), str(video), str(tmp_path / f"{frames}"), str(frames)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    peaks = [peak_mib(frames) for frames in (100, 500, 2000)]
    assert max(peaks) < min(peaks) + 30, peaks
