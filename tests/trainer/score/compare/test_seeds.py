"""Means and paired differences over seeds: against hand counts, and how often their intervals contain the truth."""

from pathlib import Path

import numpy as np
import pytest

from flowmask.models.errors import ConfigError
from flowmask.trainer.score.compare.evaluation import Evaluated
from flowmask.trainer.score.compare.seeds import over_seeds


def evaluated(scores: dict[tuple[str, str], float]) -> Evaluated:
    return Evaluated(Path("x"), Path("x"), {pair: {"jf": value} for pair, value in scores.items()}, {}, {}, None)


def test_the_mean_and_the_difference_are_over_what_every_seed_and_both_sides_have() -> None:
    ours = [evaluated({("a", "0"): 10, ("a", "1"): 20, ("b", "0"): 60}), evaluated({("a", "0"): 20, ("b", "0"): 40})]
    theirs = [evaluated({("a", "0"): 5, ("b", "0"): 50, ("c", "0"): 1}), evaluated({("b", "0"): 45, ("a", "0"): 5})]
    mean, interval = over_seeds(ours)
    assert mean == pytest.approx((10 + 60 + 20 + 40) / 4) and interval is not None
    assert interval[0] <= mean <= interval[1]
    difference, _ = over_seeds(ours, theirs)
    assert difference == pytest.approx((5 + 10 + 15 - 5) / 4)
    assert over_seeds(ours) == over_seeds(ours)


def test_one_video_has_no_interval_and_nothing_in_common_no_mean() -> None:
    assert over_seeds([evaluated({("a", "0"): 1, ("a", "1"): 3})]) == (2, None)
    with pytest.raises(ConfigError, match="no expression with jf in common"):
        over_seeds([evaluated({("a", "0"): 1})], [evaluated({("b", "0"): 1})])


def test_what_all_videos_of_both_sides_share_is_no_doubt_about_their_difference() -> None:
    """Hard and easy videos are the same for both sides, so a difference of 1 everywhere has an interval of width 0."""
    generator = np.random.default_rng(0)
    base = [{(f"v{v}", "0"): float(x) for v, x in enumerate(generator.uniform(0, 100, 50))} for _ in range(3)]
    more = [evaluated({pair: value + 1 for pair, value in one.items()}) for one in base]
    assert over_seeds(more, [evaluated(one) for one in base]) == (pytest.approx(1), pytest.approx([1, 1]))


@pytest.mark.parametrize(("seeds", "videos", "of_seed", "of_video"), [(8, 40, 0.0, 5.0), (8, 60, 1.0, 5.0)])
def test_the_interval_holds_the_truth_as_often_as_it_says(
    seeds: int, videos: int, of_seed: float, of_video: float
) -> None:
    """Seeds and videos both vary. With 8 seeds, resampling gives a little less than 95 %."""
    held, rounds = 0, 200
    for trial in range(rounds):
        generator = np.random.default_rng(trial)
        by_seed, by_video = generator.normal(0, of_seed, seeds), generator.normal(0, of_video, videos)
        rows = [
            evaluated({(f"v{v}", "0"): float(one + by_video[v] + generator.normal(0, 1)) for v in range(videos)})
            for one in by_seed
        ]
        _, interval = over_seeds(rows, resamples=300)
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert 0.88 * rounds <= held <= 0.99 * rounds
