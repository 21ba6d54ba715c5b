"""Slices of a dataset against hand counts."""

from typing import Any

import numpy as np
import pytest

from flowmask.data_pipeline.sources.base import Expression
from flowmask.trainer.score.slices import TITLES, TRUTH, TrueSize, has_motion, slices


class Made:
    """A video with only the fields that slices need."""

    has_masks = True

    def __init__(self, *expressions: Expression) -> None:
        self.video_id, self.expressions = "v", expressions


def entry(jf: float, *, absent: int = 0, share: float | None = 0.5) -> dict[str, Any]:
    return {"right": {"j": jf, "jf": jf}, TRUTH: {"frames": 4, "absent": absent, "share": share}}


def made(frames: int, *parts: tuple[Expression, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    return Made(*(expression for expression, _ in parts)), {
        "frames": frames,
        "expressions": {expression.exp_id: scored for expression, scored in parts},
    }


VIDEOS = [
    made(
        24,
        (Expression("0", "a dog running", ("a",), "dynamic"), entry(10, share=0.005)),
        (Expression("1", "two dogs", ("a", "b"), "static"), entry(20, absent=1, share=0.05)),
        (Expression("2", "the dragon", (), "static"), entry(100, absent=4, share=None)),
    ),
    made(25, (Expression("0", "five birds flying away", tuple("abcde")), entry(60, absent=4, share=None))),
]


def found(name: str) -> dict[str, tuple[float, float]]:
    videos, records = zip(*VIDEOS)
    table = slices(videos, records)
    assert table is not None and table.keys() == TITLES.keys()
    return {bucket: (scores["jf"], scores["expressions"]) for bucket, scores in table[name].items()}


def test_every_expression_is_in_the_bucket_that_it_belongs_to_and_means_are_over_its_own() -> None:
    assert found("video_frames") == {"1 to 24": (pytest.approx(130 / 3), 3), "25 to 48": (60, 1)}
    assert found("object_share") == {"below 1 %": (10, 1), "3 to 10 %": (20, 1)}
    assert found("objects") == {"1": (10, 1), "2": (20, 1), "4 or more": (60, 1)}
    assert found("motion_words") == {"with": (35, 2), "without": (60, 2)}
    assert found("absent_frames") == {"none": (10, 1), "less than half": (20, 1), "all": (60, 1)}
    assert found("kind") == {"dynamic": (10, 1), "static": (60, 2)}
    assert found("target") == {"something": (30, 3), "nothing": (100, 1)}


def test_buckets_stand_in_the_order_of_what_they_hold() -> None:
    assert list(found("absent_frames")) == ["none", "less than half", "all"]


def test_a_slice_to_which_nothing_belongs_is_left_out_and_without_scores_there_is_none() -> None:
    video, record = made(1, (Expression("0", "a dog", ("a",)), entry(1)))
    table = slices([video], [record])
    assert table is not None and "kind" not in table
    unscored = {"frames": 1, "expressions": {"0": {"text": "a dog", "answered": True}}}
    assert slices([video], [unscored]) is None


def test_the_size_of_an_object_is_its_share_of_the_frames_in_which_it_is_seen() -> None:
    masks = np.zeros((5, 4, 5), bool)
    masks[1, :2], masks[3, 0] = True, True
    sizes = TrueSize()
    for piece in (masks[:2], masks[2:]):
        sizes.add(piece)
    assert sizes.facts() == {"frames": 5, "absent": 3, "share": pytest.approx((0.5 + 0.25) / 2)}
    assert TrueSize().facts() == {"frames": 0, "absent": 0, "share": None}


@pytest.mark.parametrize(
    "text",
    [
        "The dog RUNNING off",
        "swims away",
        "boats moved by wind",
        "circling the pond",
        "a bird that flies",
        "left-to-right",
    ],
)
def test_a_word_for_motion_is_told_in_any_of_its_forms(text: str) -> None:
    assert has_motion(text)


@pytest.mark.parametrize("text", ["the red circle", "the movie poster", "the goose", "the back row", ""])
def test_other_words_are_not_taken_for_motion(text: str) -> None:
    assert not has_motion(text)
