"""J and F are DAVIS's: checked against a plain dilation by the disk, and at every empty and full corner."""

import math
from itertools import product

import numpy as np
import pytest
from counters import events
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from trials import SEED, TRIALS

from flowmask.trainer.score.metrics import Tally
from flowmask.trainer.score.metrics.f import boundary, boundary_accuracy, boundary_radius
from flowmask.trainer.score.metrics.j import region_similarity

Mask = NDArray[np.bool_]


def blob(rng: np.random.Generator, height: int, width: int) -> Mask:
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(rng.integers(0, 4)):
        centre, size = rng.uniform(0, [height, width]), rng.uniform(1, max(2, min(height, width) / 2))
        mask |= (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < size**2
    return mask ^ (rng.random(mask.shape) < 0.01)


def plain_boundary(mask: Mask) -> Mask:
    out = np.zeros_like(mask)
    height, width = mask.shape
    for i in range(height):
        for j in range(width):
            below, right = min(i + 1, height - 1), min(j + 1, width - 1)
            out[i, j] = len({mask[i, j], mask[below, j], mask[i, right], mask[below, right]}) > 1
    return out


def plain_f(truth: Mask, predicted: Mask) -> float:
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    edges = plain_boundary(truth), plain_boundary(predicted)
    if not edges[0].any() or not edges[1].any():
        return float(edges[0].any() == edges[1].any())
    wide = [binary_dilation(edge, disk) for edge in edges]
    precision = (edges[1] & wide[0]).sum() / edges[1].sum()
    recall = (edges[0] & wide[1]).sum() / edges[0].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def check(trials: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(trials):
        height, width = rng.integers(1, 160, 2)
        truth, predicted = blob(rng, height, width), blob(rng, height, width)
        assert np.array_equal(boundary(truth), plain_boundary(truth))
        assert boundary_accuracy(truth, predicted) == pytest.approx(plain_f(truth, predicted), abs=1e-12)
        union = (truth | predicted).sum()
        want = (truth & predicted).sum() / union if union else 1.0
        assert region_similarity(truth, predicted) == pytest.approx(want, abs=1e-12)


def test_f_equals_a_plain_dilation_by_the_disk() -> None:
    check(25, seed=0)


@pytest.mark.long
def test_f_equals_a_plain_dilation_at_length() -> None:
    check(300 * TRIALS, seed=SEED)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 130), (600, 3), (7, 64), (65, 8)])
def test_f_of_thin_frames_and_of_pixels_at_their_borders_is_that_of_a_plain_dilation(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(SEED)
    masks = [np.zeros(shape, bool), np.ones(shape, bool), *(rng.random(shape) < share for share in (0.02, 0.5, 0.98))]
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        masks.append(np.zeros(shape, bool))
        masks[-1][corner] = True
    for truth, predicted in product(masks, masks):
        assert boundary_accuracy(truth, predicted) == plain_f(truth, predicted)


EMPTY, FULL = np.zeros((40, 60), dtype=bool), np.ones((40, 60), dtype=bool)
SOME = np.zeros((40, 60), dtype=bool)
SOME[10:20, 10:20] = True


@pytest.mark.parametrize(
    ("truth", "predicted", "j", "f"),
    [
        (EMPTY, EMPTY, 1, 1),
        (EMPTY, SOME, 0, 0),
        (SOME, EMPTY, 0, 0),
        (SOME, SOME, 1, 1),
        (FULL, FULL, 1, 1),
        (FULL, EMPTY, 0, 1),
        (EMPTY, FULL, 0, 1),
        (SOME, ~SOME, 0, 1),
    ],
)
def test_scores_of_empty_full_and_equal_masks(truth: Mask, predicted: Mask, j: float, f: float) -> None:
    assert (region_similarity(truth, predicted), boundary_accuracy(truth, predicted)) == (j, f)


def test_the_radius_is_08_percent_of_the_diagonal_rounded_up() -> None:
    assert [boundary_radius(*size) for size in ((48, 64), (120, 160), (480, 854), (1080, 1920))] == [1, 2, 8, 18]


def test_a_clip_is_scored_frame_by_frame() -> None:
    tally = Tally()
    tally.add(np.stack([SOME, EMPTY, SOME]), np.stack([SOME, EMPTY, EMPTY]))
    assert tally.scores() == {name: pytest.approx(200 / 3) for name in ("j", "f", "jf")} and not tally.sums()
    with pytest.raises(ValueError, match="shorter"):
        tally.add(np.stack([SOME, SOME]), SOME[None])


def test_the_scores_of_a_further_expression_read_no_file() -> None:
    """Else each one reads a file of every installed package, for its entry points."""
    Tally()
    with events() as seen:
        Tally()
    assert not seen
