"""The rank that is named when a job fails: the first to fail, not the ranks that then got no answer."""

import signal
from pathlib import Path

import pytest

from flowmask.launch.local.processes import JobFailedError, _verdict


def test_a_rank_that_was_killed_is_named_before_those_that_lost_touch_with_it(tmp_path: Path) -> None:
    (tmp_path / "lost_00000.txt").write_text("rank 0 lost contact with another rank")
    with pytest.raises(JobFailedError, match="rank 1 was killed by SIGKILL"):
        _verdict(tmp_path, [1, -9, None])
    with pytest.raises(JobFailedError, match=r"^rank 0 lost contact with another rank"):
        _verdict(tmp_path, [1, None, None])


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGABRT, r"NCCL .*train\.collective_timeout_s"),
        (signal.SIGKILL, "out of memory"),
        (signal.SIGSEGV, "compiled code"),
        (signal.SIGBUS, "/dev/shm"),
    ],
)
def test_a_rank_that_a_signal_killed_is_told_in_one_line_with_what_mostly_sends_it(
    number: signal.Signals, why: str, tmp_path: Path
) -> None:
    with pytest.raises(JobFailedError, match=f"^rank 1 was killed by {number.name} \\(.*{why}") as failed:
        _verdict(tmp_path, [None, -number])
    assert "\n" not in str(failed.value)
    with pytest.raises(JobFailedError, match=r"^rank 0 was killed by SIGPROF; "):
        _verdict(tmp_path, [-signal.SIGPROF, None])
