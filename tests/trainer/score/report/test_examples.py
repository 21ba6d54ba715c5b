"""The choice of expressions that a report shows."""

import itertools

from flowmask.trainer.score.report.examples import choose

KEYS = [f"v/{number:02d}" for number in range(20)]
RANKS = {key: float(7 * number % 20) for number, key in enumerate(KEYS)}


def test_a_third_are_the_worst_a_third_the_best_and_the_rest_is_drawn_from_the_others() -> None:
    worst, best, drawn = choose(KEYS, RANKS, 9, seed=1).values()
    assert [RANKS[key] for key in worst] == [0, 1, 2] and [RANKS[key] for key in best] == [19, 18, 17]
    assert len(drawn) == 3 and set(drawn).isdisjoint((*worst, *best))
    assert any(choose(KEYS, RANKS, 9, seed=seed) != choose(KEYS, RANKS, 9, seed=1) for seed in range(5))
    assert choose(KEYS[::-1], dict(reversed(RANKS.items())), 9, seed=1) == choose(KEYS, RANKS, 9, seed=1)


def test_as_many_as_asked_for_are_shown_once_each_and_it_is_said_how_they_were_chosen() -> None:
    for scored, count in itertools.product((0, 1, 2, 3, 19, 20), range(25)):
        ranks = {key: RANKS[key] for key in KEYS[:scored]}
        found = choose(KEYS, ranks, count, seed=0)
        shown = [key for keys in found.values() for key in keys]
        assert len(shown) == len(set(shown)) == min(count, len(KEYS))
        assert all(found.values()) and len(found) <= 3
    assert [how.split(":")[0] for how in choose(KEYS, RANKS, 3, seed=0)] == ["Worst", "Best", "Random"]
    assert list(choose(KEYS, {}, 3, seed=4)) == ["Random: drawn by seed 4 from all"]
