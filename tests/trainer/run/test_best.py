"""The best evaluation is the best of those with the same definition."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import run_config, start

from flowmask.trainer.run.best import best_so_far, definition_of, is_better, short_hash
from flowmask.trainer.state.checkpoint import read_state

LOSSES = {"evaluate.every_steps": 2, "evaluate.jf_examples": 0, "evaluate.examples": 3, "train.steps": 4}
SETTINGS: dict[str, Any] = {"timesteps": [1, 500], "examples": 9, "jf_examples": 4, "sampler": {"steps": 1}}
FOUND = {"step": 4, "metric": "eval_loss", "value": 0.5}


def started(changes: dict[str, Any], *, cache: str, decoder: str, older: bool) -> tuple[Any, list[str]]:
    """The best that remains when evaluations change, and the messages about it."""
    said: list[str] = []
    before, now = (run_config(Path(), Path(), {"evaluate": more}) for more in (SETTINGS, SETTINGS | changes))
    best = dict(FOUND) if older else {**FOUND, "definition": definition_of(before.evaluate, cache="a", decoder="d")}
    state = json.loads(json.dumps({"best": best, "config": before.model_dump(mode="json")}))
    definition = definition_of(now.evaluate, cache=cache, decoder=decoder)
    return best_so_far(state, now, definition, say=said.append), said


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("changes", [{}, {"overlays": 9}, {"every_steps": 7}, {"timesteps": [500, 1]}])
def test_the_best_goes_on_while_evaluations_are_measured_alike(changes: dict[str, Any], older: bool) -> None:
    best, said = started(changes, cache="a", decoder="d", older=older)
    assert best is not None and best.items() >= FOUND.items() and not said


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": [1000]},
        {"timesteps": [1]},
        {"examples": 10},
        {"jf_examples": 3},
        {"jf_examples": 0},
        {"sampler": {"steps": 2}},
        {"sampler": {"shift": 1.0}},
        {"best": "eval_loss"},
        {"cache": "elsewhere"},
    ],
)
def test_it_begins_again_with_one_line_when_they_are_not(changes: dict[str, Any], older: bool) -> None:
    best, said = started(changes, cache="b" if "cache" in changes else "a", decoder="d", older=older)
    assert best is None and len(said) == 1 and "\n" not in said[0]
    assert all(f"{name}" in said[0] for name in changes) and "step 4" in said[0]


def test_another_content_of_the_cache_or_of_the_mask_decoder_is_another_evaluation_a_moved_cache_is_none() -> None:
    assert started({}, cache="b", decoder="d", older=False)[0] is None
    assert started({}, cache="a", decoder="e", older=False)[0] is None
    assert started({"cache": "moved"}, cache="a", decoder="d", older=False)[0] is not None


def test_whole_videos_are_part_of_the_definition_where_there_are_some_and_older_ones_stay_as_they_were() -> None:
    settings = run_config(Path(), Path(), {"evaluate": SETTINGS}).evaluate
    without = definition_of(settings, cache="a", decoder="d")
    assert without.keys() == {"examples", "timesteps", "jf_examples", "sampler", "cache", "mask_decoder"}
    whole = definition_of(settings, cache="a", decoder="d", whole_videos={"videos": "b"})
    assert whole == {**without, "whole_videos": {"videos": "b"}}


def test_a_loss_is_better_when_it_is_lower_a_score_when_it_is_higher_and_two_metrics_are_not_compared() -> None:
    for metric, better in (("eval_loss", 0.4), ("eval_jf", 0.6), ("eval_whole_jf", 0.6)):
        best = {"metric": metric, "value": 0.5}
        assert is_better(metric, better, best) and not is_better(metric, 1 - better, best)
        assert is_better(metric, 0.5, None) and is_better(metric, 0.5, {"metric": "other", "value": 0.5})
        assert not is_better(metric, float("nan"), None)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def best_step(run: Path) -> int:
    return int(read_state((run / "checkpoints" / "best").resolve())["step"])


def test_a_run_whose_evaluations_change_keeps_its_best_until_the_first_of_the_new_ones(
    lab: Path, tmp_path: Path
) -> None:
    easy, hard, run = {"evaluate.timesteps": [1]}, {"evaluate.timesteps": [1000]}, tmp_path / "run"
    first = {name: tmp_path / name for name in ("easy", "hard")}
    for name, timesteps in (("easy", easy), ("hard", hard)):
        start(lab, first[name], LOSSES | timesteps)
    lower, higher = sorted(first, key=lambda name: evaluations(first[name])[-1]["eval_loss"])
    shutil.copytree(first[lower], run, symlinks=True)
    kept, changed = ({"easy": easy, "hard": hard}[name] for name in (lower, higher))
    start(lab, run, LOSSES | kept | {"train.steps": 5})
    assert best_step(run) == 4 and "evaluations differ from before" not in (run / "log.txt").read_text()
    start(lab, run, LOSSES | changed | {"train.steps": 6})  # a larger loss, but the best of its definition
    assert best_step(run) == 6
    log = (run / "log.txt").read_text()
    assert "evaluate" in log and log.count("evaluations differ from before (timesteps: ") == 1
    names = [row["definition"] for row in evaluations(run)]
    assert names[0] == names[1] != names[2]
    state = read_state((run / "checkpoints" / "latest").resolve())["state"]
    assert short_hash(state["best"]["definition"]) == names[2]
