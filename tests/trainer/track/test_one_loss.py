"""A user sees the same loss everywhere."""

import re
from pathlib import Path

from runs import SignalAt, start

from flowmask.launch.jobs.train import TrainJob
from flowmask.trainer.track.points import StepPoints

EVERY = 3


def shown(out: Path) -> dict[int, str]:
    """The loss of each line of log.txt, by step."""
    lines = re.findall(r"  step +(\d+)/10  epoch \S+  loss (\S+)  lr", (out / "log.txt").read_text())
    return {int(step): loss for step, loss in lines}


def sent(out: Path, *, after: int) -> dict[int, str]:
    """The loss of each point that MLflow gets for an ended run, by step."""
    points = StepPoints(out, every_steps=EVERY, after=after).take(100, final=True)
    return {point.step: f"{point.metrics['loss']:.5f}" for point in points}


def test_status_log_and_mlflow_show_one_loss_also_where_a_stop_has_cut_a_window(lab: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", {"train.log_every_steps": EVERY}
    with SignalAt.on_every_run():
        start(lab, out, settings)
    stopped = max(shown(out))
    assert stopped % EVERY and sent(out, after=0) == shown(out)
    assert f"{TrainJob.status(out).loss:.5f}" == shown(out)[stopped]
    start(lab, out, settings)
    assert sent(out, after=stopped) == {step: loss for step, loss in shown(out).items() if step > stopped}
    assert max(shown(out)) == 10 and f"{TrainJob.status(out).loss:.5f}" == shown(out)[10]
