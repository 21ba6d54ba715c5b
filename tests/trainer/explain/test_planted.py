"""Two real ranks over gloo with planted slow disks, slow copies, slow ranks and hangs: each cause is named."""

import os
import random
from pathlib import Path

import pytest
from planted import KINDS, Fault
from runs import run_group
from trials import SEED, TRIALS

from flowmask.trainer.explain.hang import HANG, read_hang, who_is_missing
from flowmask.trainer.explain.run_page import page_file, write_run_page
from flowmask.trainer.explain.timeline import aligned, read_timeline
from flowmask.trainer.explain.verdict import COMPUTING, COPYING, READING, a_step, explain

CAUSES = {"disk": READING, "copy": COPYING, "rank": COMPUTING}
BUSY = 1 + os.getloadavg()[0] / 2  # other tests run at the same time: a fault must last longer than their load
TIMEOUT_S = 6.0 * BUSY
STEPS = {"disk": 6, "copy": 6, "rank": 6, "hang": 3}  # steps reserved for each fault, SETTLING of them without it:
SETTLING = 2  # batches that were read before the fault began
# after half of the timeout, stacks are written; the others must still be waiting
SLOW_S, HANG_S = (0.3 * BUSY, 0.82 * TIMEOUT_S)


def faults_of(trials: int, *, seed: int) -> list[Fault]:
    """Every kind once per trial, in random order, each in a random rank."""
    draws, found, step = random.Random(seed), [], SETTLING
    for _ in range(trials):
        for kind in draws.sample(KINDS, len(KINDS)):
            last = step + STEPS[kind] - SETTLING - 1
            first, last, seconds = (step, step, HANG_S) if kind == "hang" else (step, last, SLOW_S)
            found.append(Fault(kind, draws.randrange(2), first, last, seconds))
            step += STEPS[kind]
    return found


@pytest.mark.parametrize("trials", [1, pytest.param(20 * TRIALS, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_a_planted_cause_and_its_rank_are_named_every_time(lab: Path, tmp_path: Path, trials: int) -> None:
    out, faults = tmp_path / "run", faults_of(trials, seed=SEED)
    overrides = {
        "train.steps": faults[-1].last + 1 + SETTLING,
        "train.log_every_steps": 1,
        "train.collective_timeout_s": TIMEOUT_S,
        "checkpoint.every_steps": 10**6,
        "data.threads": 0,  # reading ahead in a thread would hide a fault behind a longer step
    }
    job = {"lab": str(lab), "out": str(out), "overrides": overrides, "faults": faults}
    run_group([job], folder=tmp_path / "logs", timeout_s=240 + 60 * BUSY * trials)
    turns = {turn[0].step: turn for turn in aligned(read_timeline(out))}
    log, wrong = (out / "log.txt").read_text(), []
    for fault in faults:
        if fault.kind == "hang":
            (folder,) = (out / HANG).glob(f"*-step-{fault.first + 1:08d}")
            said = who_is_missing(read_hang(folder), 2)
            right = said.startswith(f"Rank {fault.rank} did not come to all_reduce number") and said in log
            right = (
                right and "planted.py" in said and "slow_loss" in (folder / f"rank-{fault.rank:05d}.txt").read_text()
            )
        else:
            found = explain(a_step([turns[step + 1] for step in range(fault.first + 1, fault.last + 1)]))
            said, right = str(found), (found.rank, found.cause) == (fault.rank, CAUSES[fault.kind])
        if not right:
            wrong.append((fault, said))
    assert not wrong
    write_run_page(out, page_file(out, None))
    assert (out / "report.html").stat().st_size > 10_000
