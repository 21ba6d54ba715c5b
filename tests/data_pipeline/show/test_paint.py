"""Outlines and masks are visible on a picture of any colour."""

import itertools

import numpy as np
import pytest

from flowmask.data_pipeline.show.paint import CELL_PX, PREDICTED_COLOUR, TRUE_COLOUR, Rgb, lit, outlined, paint


def luminance(colour: np.ndarray) -> float:
    """Relative luminance of sRGB 0..255, as WCAG defines it."""
    part = np.asarray(colour, float) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("tone", [TRUE_COLOUR, PREDICTED_COLOUR])
def test_an_outline_has_a_tone_that_stands_out_from_any_colour(tone: Rgb) -> None:
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3:6] = True
    for colour in itertools.product((0, 60, 90, 120, 160, 200, 255), repeat=3):
        picture = np.full((9, 9, 3), colour, np.uint8)
        drawn = outlined(picture, mask, tone)
        inside, outside = drawn[3, 4], drawn[2, 4]
        assert max(contrast(inside, picture[0, 0]), contrast(outside, picture[0, 0])) >= 3
        assert contrast(inside, outside) >= 3
        assert (drawn[4, 4] == picture[4, 4]).all() and (drawn[0, 0] == picture[0, 0]).all()


def test_an_empty_mask_has_no_outline_and_the_border_of_a_full_frame_is_none() -> None:
    frame = np.full((CELL_PX, CELL_PX, 3), 200, np.uint8)
    empty = lit(frame, np.zeros(frame.shape[:2], bool), TRUE_COLOUR)
    full = lit(frame, np.ones(frame.shape[:2], bool), TRUE_COLOUR)
    assert len(np.unique(empty)) == 1 and len(np.unique(full.reshape(-1, 3), axis=0)) == 1


def test_a_fill_mixes_each_value_with_its_tone_and_changes_nothing_else() -> None:
    rng = np.random.default_rng(0)
    frame, mask = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8), rng.random((90, 70)) < 0.5
    given, tone = frame.copy(), (230, 97, 0)
    painted = paint(frame, [(mask, tone)])
    inside = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
    inside[[0, -1]], inside[:, [0, -1]] = False, False
    assert inside.any() and np.array_equal(painted[~mask], frame[~mask]) and np.array_equal(frame, given)
    assert np.abs(painted[inside] - (0.55 * frame[inside] + 0.45 * np.array(tone))).max() <= 0.5 + 1e-4
    painted[:] = 0
    assert np.array_equal(frame, given)
