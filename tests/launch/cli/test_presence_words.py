"""The options for presence reach the job: the flag as a key of the config, the folder unchanged."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flowmask.launch.cli.main import app
from flowmask.launch.config import load_job
from flowmask.launch.jobs import EvaluateJob
from flowmask.models.errors import ConfigError


def test_the_flag_calibrate_is_the_key_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"source": "mevis", "root": "d", "split": "valid_u"}
    config = tmp_path / "evaluate.yaml"
    config.write_text(yaml.safe_dump({"out": "o", "checkpoint": "c", "data": data}))
    started: list[EvaluateJob] = []

    def run_job(kind: str, path: Path, overrides: list[str], **_: Any) -> None:
        started.append(load_job(path, EvaluateJob, overrides))

    monkeypatch.setattr("flowmask.launch.cli.main.run_job", run_job)
    other = [f"calibrate.data.{key}={value}" for key, value in (data | {"root": "e"}).items()]
    for more, enabled in (([], False), (["--calibrate"], True)):
        CliRunner().invoke(app, ["evaluate", str(config), *other, *more], catch_exceptions=False)
        job = started.pop()
        assert job.calibrate.enabled == enabled and job.calibrate.data is not None
        roots = [str(given.path) for given in job.inputs()]
        assert ("e" in roots) == enabled, "what is read is checked before the job starts"
    refused = CliRunner().invoke(app, ["evaluate", str(config), "--calibrate"]).exception
    assert isinstance(refused, ConfigError) and "calibrate.data is missing" in str(refused)


@pytest.mark.parametrize("command", ["predict clip.mp4 dog --checkpoint run", "export run"])
def test_presence_reaches_predictions_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").touch()
    Path("run").mkdir()
    name = command.split()[0]
    given: list[Any] = []

    def stop(*_: Any, **options: Any) -> None:
        given.append(options["presence"])
        raise ConfigError("seen")

    function = {"predict": "predict_videos", "export": "export"}[name]
    monkeypatch.setattr(f"flowmask.trainer.predict.{name}.{function}", stop)
    for more, wanted in (([], None), (["--presence", "out/e"], "out/e")):
        CliRunner().invoke(app, [*command.split(), *more])
        assert given.pop() == wanted
