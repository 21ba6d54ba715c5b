"""The cost of reading an H.264 mp4 by decord, by PyAV forward, and by a cache build's reader, which chooses one.

    python benchmarks/video.py [--json] [--frames N ...] [--clips N] [--rounds N]

480x854 px, x264's default groups of 250 pictures, written here. CPU seconds, medians over rounds: `sparse` for a clip
of 17 frames drawn as for a cache, `whole` for the first 120 frames in order, `open` for opening and counting.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from flowmask.data_pipeline.clip.frames import sparse_frames
from flowmask.data_pipeline.video.forward import ForwardReader
from flowmask.data_pipeline.video.packets import facts_of
from flowmask.data_pipeline.video.seeking import SeekingReader
from flowmask.data_pipeline.video.video_file import VideoFile
from flowmask.data_pipeline.video.writing import VideoWriter

HEIGHT, WIDTH, WHOLE = 480, 854, 120


def write_film(path: Path, frames: int) -> None:
    """A camera that pans over blurred noise."""
    small = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(small).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    with VideoWriter(path, height=HEIGHT, width=WIDTH, fps=25) as film:
        for number in range(frames):
            left = 3 * number % WIDTH
            film.add(np.ascontiguousarray(scene[:, left : left + WIDTH]))


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(path: Path, *, frames: int, clips: int, rounds: int) -> dict[str, float]:
    """Medians over the rounds, by `what.way`."""
    rng, facts = Random(0), facts_of(path)
    drawn = [sparse_frames(rng, anchor=rng.randrange(frames), length=frames, frames=17) for _ in range(clips)]
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        opened = {
            "ours": VideoFile(path),
            "pyav": ForwardReader(path, facts.first),
            "decord": SeekingReader(path, facts),
        }
        for way, reader in opened.items():
            sparse = cpu_s(lambda: [reader.frames(sorted(set(ids))) for ids in drawn])  # noqa: B023 - called at once
            whole = cpu_s(lambda: reader.frames(range(min(frames, WHOLE))))  # noqa: B023
            found.setdefault(f"sparse.{way}", []).append(sparse / clips)
            found.setdefault(f"whole.{way}", []).append(whole)
        found.setdefault("open.ours", []).append(cpu_s(lambda: len(VideoFile(path))))
        found.setdefault("open.decord", []).append(cpu_s(lambda: SeekingReader(path, facts)))
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--frames", type=int, nargs="+", default=[120, 1000, 4000])
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for frames in options.frames:
            path = Path(folder) / f"{frames}.mp4"
            write_film(path, frames)
            figures[str(frames)] = measure(path, frames=frames, clips=options.clips, rounds=options.rounds)
            if not options.json:
                print(frames, figures[str(frames)])
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
