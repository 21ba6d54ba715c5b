"""The cost of J and F for a frame, against the textbook formula; both must give the same numbers.

    python benchmarks/metrics.py [--json] [--frames N] [--rounds N]

Textbook: two outlines, each dilated by a disk of 0.8 % of the diagonal, with one shifted copy of the outline for each
pixel of the disk; precision, recall and their harmonic mean. Masks: blobs with rough outlines and holes; the prediction
is moved and roughened. CPU milliseconds a frame, medians over alternating rounds.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from flowmask.trainer.score.metrics.f import boundary_accuracy
from flowmask.trainer.score.metrics.j import region_similarity

Mask = NDArray[np.bool_]
SIZES = ((480, 854), (720, 1280))
CLOSE = 1e-12


def textbook(truth: Mask, predicted: Mask) -> tuple[float, float]:
    """J and F of two bool [H W]."""
    union = (truth | predicted).sum()
    j = (truth & predicted).sum() / union if union else 1.0
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    edges = outline(truth), outline(predicted)
    counts = edges[0].sum(), edges[1].sum()
    if not all(counts):
        return float(j), float(not any(counts))
    recall = (edges[0] & dilated(edges[1], radius)).sum() / counts[0]
    precision = (edges[1] & dilated(edges[0], radius)).sum() / counts[1]
    return float(j), float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def outline(mask: Mask) -> Mask:
    """Pixels that differ from their right, lower or diagonal neighbour; the last row and column use existing ones."""
    height, width = mask.shape
    wide = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    shifted = (wide[y : y + height, x : x + width] for y, x in ((0, 1), (1, 0), (1, 1)))
    return np.any([mask != other for other in shifted], axis=0)


def dilated(edge: Mask, radius: int) -> Mask:
    """Whether a pixel of `edge` is in the disk x^2 + y^2 <= radius^2 around a pixel."""
    height, width = edge.shape
    wide, found = np.pad(edge, radius), np.zeros_like(edge)
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if x**2 + y**2 <= radius**2:
                found |= wide[radius + y : radius + y + height, radius + x : radius + x + width]
    return found


def ours(truth: Mask, predicted: Mask) -> tuple[float, float]:
    return region_similarity(truth, predicted), boundary_accuracy(truth, predicted)


def pairs(height: int, width: int, *, frames: int) -> list[tuple[Mask, Mask]]:
    """True and predicted masks, which cover about a tenth of a frame."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(frames):
        field = gaussian_filter(rng.standard_normal((height, width)), sigma=height / 24)
        rough = gaussian_filter(rng.standard_normal((height, width)), sigma=2)
        moved = np.roll(field, rng.integers(-6, 7, 2), axis=(0, 1)) + 0.1 * field.std() * rough / rough.std()
        found.append((field > 1.3 * field.std(), moved > 1.3 * field.std()))
    return found


def cpu_ms(score: Callable[[Mask, Mask], tuple[float, float]], masks: Sequence[tuple[Mask, Mask]]) -> float:
    """CPU milliseconds a frame."""
    begun = time.thread_time()
    for pair in masks:
        score(*pair)
    return 1000 * (time.thread_time() - begun) / len(masks)


def measure(height: int, width: int, *, frames: int, rounds: int) -> dict[str, float]:
    """Medians over rounds, and the largest difference of a score."""
    masks = pairs(height, width, frames=frames)
    differences = [abs(a - b) for pair in masks for a, b in zip(textbook(*pair), ours(*pair))]
    times = [(cpu_ms(textbook, masks), cpu_ms(ours, masks)) for _ in range(rounds)]
    book, here = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(before / after for before, after in times)
    return {
        "textbook_ms": round(book, 3),
        "ours_ms": round(here, 3),
        "ratio": round(ratio, 2),
        "difference": max(differences),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for height, width in SIZES:
        name = f"{height}x{width}"
        figures[name] = measure(height, width, frames=options.frames, rounds=options.rounds)
        if not options.json:
            print(name, figures[name])
        assert figures[name]["difference"] <= CLOSE
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
