"""Intervals over videos against the enumeration of all draws; they depend on nothing but seed and content."""

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from trials import SEED

from flowmask.trainer.score.intervals import Drawable, Interval, intervals, resampled


def rows(videos: int, *, seed: str = "rows") -> list[Drawable]:
    """Some expressions of each video: `jf` for all, `n_acc` or `t_acc` for each, and sums of a set-wide metric."""
    draw = random.Random(f"{SEED} {seed}")
    found = []
    for video in range(videos):
        for number in range(draw.randint(1, 4)):
            which = "n_acc" if (video + number) % 3 == 0 else "t_acc"
            values = {"jf": 100 * draw.random(), which: 100.0 * draw.randint(0, 1)}
            found.append(Drawable(f"v{video}", values, {"oiou": [draw.random(), 1 + draw.random()]}))
    return found


def overall(sums: list[float]) -> float:
    return 100 * sums[0] / sums[1]


def measured(some: list[Drawable], *, seed: int = 0) -> dict[str, Interval | None]:
    parts = {"final": ("jf", "n_acc", "t_acc")}
    return intervals(some, seed=seed, of_sums={"oiou": overall}, means_of=parts)


def written_out(some: list[Drawable], value: Callable[[list[Drawable]], float | None]) -> list[float]:
    """The interval of a set's number, from every possible draw of its videos."""
    videos = sorted({row.video for row in some})
    draws = np.stack(np.meshgrid(*[range(len(videos))] * len(videos)), axis=-1).reshape(-1, len(videos))
    sets = [[row for place in draw for row in some if row.video == videos[place]] for draw in draws]
    known = [found for one in sets if (found := value(one)) is not None]
    return np.percentile(known, [2.5, 97.5]).tolist()


def mean_of(name: str) -> Callable[[list[Drawable]], float | None]:
    def mean(some: list[Drawable]) -> float | None:
        values = [row.values[name] for row in some if name in row.values]
        return float(np.mean(values)) if values else None

    return mean


def final_of(some: list[Drawable]) -> float | None:
    parts = [mean_of(name)(some) for name in ("jf", "n_acc", "t_acc")]
    known = [part for part in parts if part is not None]
    return sum(known) / 3 if len(known) == 3 else None


def oiou_of(some: list[Drawable]) -> float:
    return overall(np.sum([row.sums["oiou"] for row in some], axis=0).tolist())


@pytest.mark.parametrize(
    ("name", "value"), [("jf", mean_of("jf")), ("n_acc", mean_of("n_acc")), ("final", final_of), ("oiou", oiou_of)]
)
def test_an_interval_is_that_of_all_draws_of_the_videos(
    name: str, value: Callable[[list[Drawable]], float | None]
) -> None:
    some = rows(5)
    parts = {"final": ("jf", "n_acc", "t_acc")}
    found = intervals(some, seed=0, of_sums={"oiou": overall}, means_of=parts, resamples=40_000)[name]
    assert found == pytest.approx(written_out(some, value), abs=2.5)


def test_a_draw_adds_up_each_video_as_often_as_it_was_drawn_and_draws_as_many_as_there_are() -> None:
    sums = np.eye(7)
    found = resampled(sums, seed=SEED, resamples=500)
    assert (found.sum(axis=1) == 7).all() and (found == found.round()).all() and found.max() > 1
    assert found.mean(axis=0) == pytest.approx(np.ones(7), abs=0.3)


def test_an_interval_needs_two_videos_that_count() -> None:
    alone = rows(1)
    assert set(measured(alone).values()) == {None}
    two = [Drawable("a", {"jf": 1.0, "n_acc": 0.0}), Drawable("a", {"n_acc": 100.0}), Drawable("b", {"jf": 3.0})]
    found = measured(two)
    assert found["n_acc"] is None and found["jf"] == [1.0, 3.0]
    assert intervals([], seed=0) == {}


def test_intervals_depend_on_the_seed_and_on_no_order() -> None:
    some = rows(30)
    wanted = measured(some)
    for number in range(5):
        mixed = random.Random(f"{SEED} order {number}").sample(some, len(some))
        assert measured(mixed) == wanted
    assert measured(some, seed=1) != wanted


def test_more_videos_make_an_interval_narrower_and_more_sentences_of_each_do_not() -> None:
    def width(videos: int, *, times: int = 1) -> float:
        found = intervals([row for row in rows(videos, seed="width") for _ in range(times)], seed=0)["jf"]
        assert found is not None
        return found[1] - found[0]

    assert width(160) < 0.7 * width(40)
    assert width(40, times=9) == pytest.approx(width(40))


def test_ten_thousand_videos_take_less_than_two_seconds() -> None:
    draw = np.random.default_rng(SEED)
    some = [Drawable(f"v{i // 3}", {"j": x, "f": x, "jf": x}) for i, x in enumerate(draw.random(30_000).tolist())]
    began = time.process_time()
    intervals(some, seed=0)
    assert time.process_time() - began < 2
