"""A rank that hangs or dies ends the job in bounded time with one line; saved checkpoints are kept."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from runs import losses, run_config, run_group, start_group

from flowmask.launch.local.processes import JobFailedError, run_local
from flowmask.trainer.state.steps import complete

TIMEOUT_S = 6  # enough on a busy machine, where tests run at the same time
STEPS = 40


@pytest.mark.parametrize(("stage", "number"), [(1, signal.SIGSTOP), (3, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_rank_that_hangs_or_dies_ends_the_others_within_the_timeout(
    lab: Path, tmp_path: Path, stage: int, number: signal.Signals
) -> None:
    overrides = {
        "train.zero_stage": stage,
        "train.steps": STEPS,
        "train.collective_timeout_s": TIMEOUT_S,
        "train.micro_batch": 1,
    }
    out = tmp_path / "run"
    job = {"lab": str(lab), "out": str(out), "overrides": overrides}
    group = start_group([job], folder=tmp_path / "logs")
    try:
        until = time.monotonic() + 120
        while len(complete(out / "checkpoints")) < 2:
            assert time.monotonic() < until and all(rank.exitcode is None for rank in group)
            time.sleep(0.005)
        os.kill(group[1].pid, number)
        group[0].join(TIMEOUT_S + 20)
        assert group[0].exitcode == 1, "the rank that is left ends by itself"
    finally:
        for rank in group:
            rank.kill()
            rank.join()
    said = (tmp_path / "logs" / "log_0.txt").read_text().strip().splitlines()[-1]
    assert said.startswith("flowmask.models.errors.RankLostError: rank 0 lost contact with another rank")
    assert f"{TIMEOUT_S} s (train.collective_timeout_s)" in said
    called = r"Rank 1 did not come to .* number \d+( \(.*\))?, in which the others wait, and left no stack"
    missing = re.search(called, said)
    assert missing is not None or number == signal.SIGKILL, "a connection that is closed is told at once"
    if stage == 0:
        run_group([job], folder=tmp_path / "again")
        assert len(losses(out)) == STEPS


def test_the_launcher_says_in_one_line_that_a_rank_hangs_and_leaves_none_behind(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = {"train.steps": 4000, "train.collective_timeout_s": TIMEOUT_S, "train.micro_batch": 1}
    resolved = run_config(lab, out, overrides).model_dump(mode="json")
    stopped: list[psutil.Process] = []

    def stop_rank_one() -> None:
        while len(complete(out / "checkpoints")) < 2:
            time.sleep(0.01)
        ranks = psutil.Process().children()
        stopped.extend(rank for rank in ranks if rank.environ().get("RANK") == "1")
        stopped[0].suspend()

    threading.Thread(target=stop_rank_one, daemon=True).start()
    with pytest.raises(JobFailedError, match=r"^rank 0 lost contact with another rank") as failed:
        run_local("train", resolved, processes=2)
    assert "\n" not in str(failed.value) and not stopped[0].is_running()
