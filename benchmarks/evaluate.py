"""The speed-up of an evaluation that does no work twice and overlaps its stages, and the largest possible speed-up.

    python benchmarks/evaluate.py [--json] [--videos N] [--sentences N] [--rounds N] [--threads N]

`naive`: sentence by sentence, as the published script: read, encode, sample, decode, write, score. `ours`: as
`flowmask evaluate`. Wall seconds; equal masks. `allowed` is naive / ideal, `reached` is (naive / ours) / allowed.
Ideal: the models never pause after the first read; only the last sentence is judged after them. The ideal is longer
if reading, the judges or all CPU seconds on these cores take longer. Stages are timed alone, in the same round.
The models use `--threads` cores (1), as on a machine with a GPU. Tiny Wan, random DiT, 17 frames of 480x854.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from flowmask.data_pipeline.config import FrameBox
from flowmask.data_pipeline.sources.base import Expression, FolderVideo, Video
from flowmask.models.config import SamplerConfig
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import Segmenter, SegmentSettings
from flowmask.models.weights.tiny_wan import write_tiny_wan
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.inference import LoadedSegmenter
from flowmask.trainer.score.mask_places import MaskFiles
from flowmask.trainer.score.one_video import OneVideo, Record, VideoSettings, evaluate_video
from flowmask.trainer.score.pipeline import evaluate_videos

HEIGHT, WIDTH, FRAMES, OBJECTS = 480, 854, 17, 3
BOX = FrameBox(height_px=128, width_px=224)
Stages = dict[str, float]


class Filmed(FolderVideo):
    """Frames in JPEG files; masks of blobs."""

    def __init__(self, folder: Path, number: int, *, sentences: int) -> None:
        rng = np.random.default_rng(number)
        names = [f"{i:05d}" for i in range(FRAMES)]
        folder.mkdir(parents=True)
        for name in names:
            small = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / f"{name}.jpg")
        said = [Expression(str(i), f"the shape number {i}", (str(i % OBJECTS),)) for i in range(sentences)]
        super().__init__(f"v{number}", folder=folder, frame_names=names, expressions=said, has_masks=True)
        noise = rng.standard_normal((OBJECTS, FRAMES, HEIGHT // 4, WIDTH // 4 + 1))
        smooth = gaussian_filter(noise, sigma=(0, 1, 6, 6)).repeat(4, -1).repeat(4, -2)[..., :WIDTH]
        self._truth = smooth > smooth.std()

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        return np.any([self._truth[int(anno_id)][list(ids)] for anno_id in anno_ids], axis=0)


def segmenter(folder: Path) -> LoadedSegmenter:
    """The tiny Wan with a random DiT that also takes the video."""
    write_tiny_wan(folder)
    wan = WanFolder(folder)
    dit: Any = wan.empty_transformer(video_injection=True)
    dit.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    vae: Any = wan.vae()
    whole = Segmenter(
        dit.requires_grad_(False),
        vae=vae.requires_grad_(False),
        text_encoder=wan.text_encoder(torch.float32),
        mask_decoder=MaskDecoder.from_vae(vae).requires_grad_(False),
        settings=SegmentSettings(SamplerConfig()),
    )
    return LoadedSegmenter(whole, pixel_norm="half", box=BOX, weights={}, wan_files="")


def starting(out: Path) -> Callable[[Video], OneVideo]:
    def start(video: Video) -> OneVideo:
        places = {}
        for expression in video.expressions:
            folder = out / video.video_id / expression.exp_id
            folder.mkdir(parents=True)
            places[expression.exp_id] = MaskFiles(folder)
        return OneVideo(VideoSettings(), video, places, labels=out / "labels")

    return start


def naive(loaded: LoadedSegmenter, videos: Sequence[Video], out: Path) -> list[Record]:
    """Sentence by sentence, each with a separate copy of its video."""
    found, start = [], starting(out)
    for video in videos:
        for expression in video.expressions:
            alone = copy.copy(video)
            alone.expressions = (expression,)
            found.append(evaluate_video(loaded, start(alone)))
    return found


def ours(loaded: LoadedSegmenter, videos: Sequence[Video], out: Path) -> list[Record]:
    with closing(evaluate_videos(loaded, videos, starting(out), waiting=4)) as records:
        return [record for _, record in records]


def alone(loaded: LoadedSegmenter, videos: Sequence[Video], out: Path) -> tuple[Stages, Stages]:
    """Wall and CPU seconds of each of our stages, one at a time."""
    wall: Stages = defaultdict(float)
    cpu: Stages = defaultdict(float)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begun, begun_cpu = time.perf_counter(), time.process_time()
        result = work()
        wall[stage] += time.perf_counter() - begun
        cpu[stage] += time.process_time() - begun_cpu
        return result

    start = starting(out)
    for video in videos:
        one = start(video)
        ((_, clip),) = timed("read", lambda: list(one.read(loaded)))  # noqa: B023 - called at once
        latent = timed("models", lambda: loaded.encode(clip))  # noqa: B023
        answers: Iterator[tuple[Expression, torch.Tensor]] = one.sentences(loaded, latent)
        while (answer := timed("models", lambda: next(answers, None))) is not None:  # noqa: B023
            timed("judge", lambda: one.answer(*answer, clip))  # noqa: B023
        timed("judge", one.record)
    return wall, cpu


def ideal_s(wall: Stages, cpu: Stages, *, videos: int, sentences: int) -> float:
    """The smallest possible wall seconds of our work, from the stage times."""
    busy = wall["read"] / videos + wall["models"] + wall["judge"] / (videos * sentences)
    return max(busy, wall["read"], wall["judge"], sum(cpu.values()) / len(os.sched_getaffinity(0)))


def jf(records: Sequence[Record]) -> list[float]:
    return [entry["right"]["jf"] for record in records for entry in record["expressions"].values()]


def measure(folder: Path, loaded: LoadedSegmenter, videos: Sequence[Video]) -> dict[str, float]:
    """One round."""
    begun = time.perf_counter()
    one_by_one = naive(loaded, videos, folder / "naive")
    naive_s, begun = time.perf_counter() - begun, time.perf_counter()
    at_once = ours(loaded, videos, folder / "ours")
    ours_s = time.perf_counter() - begun
    wall, cpu = alone(loaded, videos, folder / "alone")
    scores = [
        [e["right"]["jf"] for r in records for e in r["expressions"].values()] for records in (one_by_one, at_once)
    ]
    assert np.allclose(*scores, atol=0.1), "both ways make the same masks, within rounding"
    ideal = ideal_s(wall, cpu, videos=len(videos), sentences=len(videos[0].expressions))
    return {
        "naive_s": naive_s,
        "ours_s": ours_s,
        "ratio": naive_s / ours_s,
        "allowed": naive_s / ideal,
        "reached": ideal / ours_s,
        **{f"{stage}_s": seconds for stage, seconds in wall.items()},
        "cpu_s": sum(cpu.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--videos", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        loaded = segmenter(home / "wan")
        videos = [Filmed(home / f"film{i}", i, sentences=options.sentences) for i in range(options.videos)]
        ours(loaded, videos[:1], home / "warm")
        rounds = [measure(home / str(i), loaded, videos) for i in range(options.rounds)]
    figures = {key: round(statistics.median(row[key] for row in rounds), 4) for key in rounds[0]}
    print(json.dumps(figures) if options.json else "\n".join(f"{key:10} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
