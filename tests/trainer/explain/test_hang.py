"""The missing rank is a pure function of the files that the ranks write; a stuck rank writes its file by itself."""

import threading
from pathlib import Path

import pytest

from flowmask.trainer.explain.hang import Stuck, Watchdog, read_hang, told_by_own_stack, who_is_missing
from flowmask.trainer.phases import Phases


def stuck(number: int, *, waits: bool, phase: str = "backward", at: str = "loader.py:1 read") -> Stuck:
    return Stuck(1, 42, 9.0, phase, number, f"all_reduce number {number} (float64 [7])", waits, at)


def test_the_rank_that_did_not_arrive_is_named() -> None:
    waiting = stuck(7, waits=True)
    place = "come to all_reduce number 7 (float64 [7]), in which the others wait"
    for behind in (stuck(6, waits=False, phase="read"), stuck(7, waits=False, phase="read")):
        said = who_is_missing({0: waiting, 1: behind, 2: waiting}, 3)
        assert said == f"Rank 1 did not {place}, but is in phase read at loader.py:1 read"
    assert who_is_missing({0: waiting, 2: waiting}, 3).startswith(f"Rank 1 did not {place}, and left no stack")
    assert who_is_missing({0: waiting}, 4).startswith("Ranks 1, 2, 3 did not come")
    assert "all wait in all_reduce number 7" in who_is_missing(dict.fromkeys(range(2), waiting), 2)


def test_where_collectives_are_queued_their_number_tells() -> None:
    """NCCL's collectives do not block where they are called, so no rank seems to wait in one."""
    queued = stuck(9, waits=False)
    said = who_is_missing({0: queued, 1: stuck(5, waits=False, phase="forward")}, 2)
    assert said == "Rank 1 did not end its step, but is in phase forward at loader.py:1 read"
    assert who_is_missing({0: queued, 1: queued}, 2).startswith("No rank is behind, all are in phase backward at")


def test_a_step_that_takes_too_long_leaves_its_stacks_once_and_one_that_ends_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    heard = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        heard.set()

    phases = Phases()
    dog = Watchdog(tmp_path / "hang" / "0002", phases, limit_s=0.2, rank=0, world_size=2, say=say)
    phases.enter("forward")
    dog.beat(41)
    with phases.waiting(phases.begin("all_reduce", [])):
        assert heard.wait(60)
    dog.close()
    folder = tmp_path / "hang" / "0002-step-00000042"
    assert f"{Path(__file__).name}" in (folder / "rank-00000.txt").read_text()
    (left,) = read_hang(folder).values()
    assert (left.step, left.phase, left.number, left.waits) == (42, "forward", 1, True)
    expected = "Rank 1 did not come to all_reduce number 1, in which the others wait, and left no stack"
    assert len(said) == 1 and expected in said[0] and str(folder) in said[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert expected in told_by_own_stack(tmp_path)
    quiet = Watchdog(tmp_path / "quiet", phases, limit_s=1000, rank=0, world_size=1, say=said.append)
    quiet.close()
    assert len(said) == 1 and not (tmp_path / "quiet").exists()
