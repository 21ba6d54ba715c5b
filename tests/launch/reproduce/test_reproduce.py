"""A whole study at the smallest size: its data, two trainings, a row that only scores, its page and its MLflow run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from looks import look_at, opened
from study_lab import TRAIN, write_study

from flowmask.launch.reproduce import reproduce
from flowmask.launch.reproduce.reproduce import FIGURES, PAGE, TABLE
from flowmask.models.errors import ConfigError
from flowmask.models.weights.wan import WanFolder


def run(path: Path) -> int:
    return reproduce.reproduce(path, [], profile=None, wait=True, dry_run=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was interrupted after its first scores, and then continued."""
    path = write_study(tmp_path_factory.mktemp("study"))
    out, write = path.parent / "study", reproduce.page.write_page
    pages: list[str] = []

    def interrupted(*args: Any, **named: Any) -> None:
        write(*args, **named)
        pages.append((out / PAGE).read_text())
        if len(pages) == 2:  # the first training and its scores are done
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reproduce.page, "write_page", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(path)
    assert "2 evaluations are missing; the same command continues" in pages[1]
    assert run(path) == 0
    return out


def test_every_figure_is_that_of_the_scores(study: Path) -> None:
    found = {row["row"]: row for row in json.loads((study / FIGURES).read_text())}
    for name, row in found.items():
        scores = json.loads((study / "evaluate" / f"{name}_seed0" / "scores.json").read_text())
        assert row["by_seed"]["0"] == pytest.approx(scores["jf"], abs=1e-3)
        assert row["mean"]["value"] == pytest.approx(scores["jf"], abs=1e-6)
    gain = found["biased"]["mean"]["value"] - found["plain"]["mean"]["value"]
    assert found["biased"]["difference"]["value"] == pytest.approx(gain)
    assert found["biased"]["published_difference"] == 10
    assert found["biased"]["cost"]["steps"] == 3 and found["biased"]["cost"]["pflop"] > 0
    assert found["twice"]["cost"] is None


def test_the_page_shows_every_row_and_the_same_sentences_and_escapes_what_it_is_told(study: Path) -> None:
    text = (study / PAGE).read_text()
    assert "bia|sed &lt;b&gt;" in text and "<b>sed" not in text and "missing; the same" not in text
    assert text.count("<figure>") >= 1 and text.count('alt="two steps"') == text.count('alt="true mask"') > 0
    for table in (study / TABLE).read_text().split("\n\n"):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


def test_the_page_can_be_read_in_any_window(study: Path, chromium: Any) -> None:
    said: list[str] = []
    look_at("study", lambda width, scheme: opened(chromium, study / PAGE, said, width=width, scheme=scheme))
    assert said == []


def test_every_row_started_from_the_dit_that_learned_videos(study: Path) -> None:
    world = study / "world"
    wan = {name: WanFolder(world / name).identity("transformer") for name in ("wan", "wan_trained")}
    assert wan["wan"] != wan["wan_trained"]
    for name in ("plain", "biased"):
        config = yaml.safe_load((study / "runs" / f"{name}_seed0" / "config.yaml").read_text())
        assert config["model"]["wan"] == str(world / "wan_trained")


def test_the_same_command_again_trains_and_scores_nothing(study: Path) -> None:
    def times() -> dict[Path, int]:
        kept = [*study.glob("runs/*/metrics.jsonl"), *study.glob("evaluate/*/scores.json")]
        return {path: path.stat().st_mtime_ns for path in kept}

    before, figures = times(), (study / FIGURES).read_text()
    assert run(study.parent / "study.yaml") == 0
    assert times() == before and len(before) == 3 + 3 and (study / FIGURES).read_text() == figures


def test_mlflow_has_one_run_above_those_of_the_trainings_with_the_figures_and_the_page(study: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{study / 'runs' / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "flowmask"]
    runs = {one.info.run_name.rpartition(" ")[0]: one for one in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("a small study")
    assert runs.keys() == {"plain_seed0", "biased_seed0", "text_to_video"}
    children = {name for name, one in runs.items() if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert children == runs.keys()
    assert {name: one.data.tags["stage"] for name, one in runs.items()} == {name: name for name in runs}
    scores = json.loads((study / "evaluate" / "plain_seed0" / "scores.json").read_text())
    assert runs["plain_seed0"].data.metrics["test/mevis/valid_u/jf"] == pytest.approx(scores["jf"])
    figures = {row["row"]: row for row in json.loads((study / FIGURES).read_text())}
    assert parent.data.metrics["jf/biased"] == pytest.approx(figures["biased"]["mean"]["value"])
    assert parent.data.metrics["gain/biased"] == pytest.approx(figures["biased"]["difference"]["value"])
    assert {PAGE, TABLE, FIGURES} <= {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert parent.info.status == "FINISHED"


@pytest.mark.parametrize(("change", "named"), [("world.dataset.train_videos=3", "train_videos"), ("start", "start")])
def test_a_study_in_another_world_is_refused_where_one_is(study: Path, change: str, named: str, tmp_path: Path) -> None:
    """A study would keep the old dataset and DiT, and its table would not show that."""
    before = {path: path.read_bytes() for path in (study / "world").rglob("*.json")}
    other = write_study(tmp_path)
    if change == "start":
        tree = yaml.safe_load((tmp_path / "video.yaml").read_text())
        (tmp_path / "video.yaml").write_text(yaml.safe_dump({**tree, "ema": {"decay": 0.6}}))
    asked = [f"out={study}", *([change] if "=" in change else [])]
    with pytest.raises(ConfigError, match=rf"holds a world with other settings \({named}\); name another folder"):
        reproduce.reproduce(other, asked, profile=None, wait=True, dry_run=False)
    assert {path: path.read_bytes() for path in before} == before


def test_a_stage_that_fails_is_named_and_the_page_says_what_is_there(study: Path) -> None:
    tree = yaml.safe_load((study.parent / "study.yaml").read_text())
    tree["rows"].append({"name": "late", "title": "late", "config": "late.yaml"})
    (study.parent / "late.yaml").write_text(yaml.safe_dump({**TRAIN, "model": {**TRAIN["model"], "init": "/nowhere"}}))
    path = study.parent / "more.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(Exception, match=r"late_seed0.*/nowhere"):
        run(path)
    assert "1 evaluation is missing" in (study / PAGE).read_text()
