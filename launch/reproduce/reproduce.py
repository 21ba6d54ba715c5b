"""Runs a study: its synthetic world if it has one, then the curriculum of its rows; updates its page after every stage.

If this process ends for any reason, the same command continues and skips finished stages.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowmask.launch.config import KEPT, read_tree
from flowmask.launch.console import err
from flowmask.launch.console import out as printer
from flowmask.launch.curriculum.curriculum import run_curriculum
from flowmask.launch.demo.world import claim, write_dataset, write_wan
from flowmask.launch.reproduce import page
from flowmask.launch.reproduce.figures import RowFigures, as_json, collect
from flowmask.launch.reproduce.study import Study, WorldConfig, load_study
from flowmask.models.files import write_atomically
from flowmask.models.folders import locks
from flowmask.models.folders.output_folder import Kind, OutputFolder
from flowmask.trainer.track.spool import Status

PAGE, TABLE, FIGURES, WORLD = "study.html", "study.md", "study.json", "world.json"
STUDY = Kind("a study", older=lambda out: None)  # older versions wrote no study
_VIDEO_DIT = "text_to_video"  # the stage of a world that trains the rows' initial model


def reproduce(path: Path, overrides: Sequence[str], *, profile: str | None, wait: bool, dry_run: bool) -> int:
    """Run the unfinished part of a study, write its page; returns the exit code. UserError names the failed stage."""
    study = load_study(path, overrides, profile=profile)
    command = " ".join(
        ["flowmask reproduce", str(path), *([f"--profile {profile}"] if profile else []), *map(_shown, overrides)]
    )
    page_file = page.page_file(study.out / PAGE)
    if dry_run:
        return _describe(study)
    page_file.refuse()
    with OutputFolder(study.out, STUDY).held(patience_s=locks.GLANCE_S):
        values: dict[str, Any] = {}
        if study.config.world is not None:
            code = _make_world(study, study.config.world)
            if code:
                return code
            values = _values(study)
        curriculum = study.curriculum(values=values)

        def publish() -> None:
            figures = collect(study)
            page.write_page(page_file, title=study.config.title, command=command, figures=figures)
            write_atomically(study.out / TABLE, page.markdown(figures))
            write_atomically(study.out / FIGURES, as_json(figures))

        def at_end(status: Status) -> None:
            figures = collect(study)
            if any(one.scores for one in figures):
                publish()
            _track(study, figures, status)

        try:
            code = run_curriculum(curriculum, wait=wait, after_stage=publish, at_end=at_end)
        except BaseException:
            if any(one.scores for one in collect(study)):  # a study without scores has no page
                publish()
            raise
        publish()
    figures = collect(study)
    printer.print(page.on_terminal(figures))
    err.print(f"page: {study.out / PAGE}; the same table in Markdown and JSON is beside it")
    return code


def _shown(override: str) -> str:
    """An override for display, with secrets masked."""
    key, _, _ = override.partition("=")
    return f"{key}=***" if any(f"{kept}." in f".{key}." for kept in KEPT) else override


def _track(study: Study, figures: Sequence[RowFigures], status: Status) -> None:
    """Send the table's figures and the page to the parent MLflow run of the trainings."""
    from flowmask.trainer.track.groups import end_group

    metrics = {f"jf/{one.row.name}": one.mean.mean for one in figures if one.mean is not None}
    metrics |= {f"gain/{one.row.name}": one.against.mean for one in figures if one.against is not None}
    end_group(
        study.out / "mlflow",
        sorted({trial.run for trial in study.trials()}),
        status,
        step=sum(len(one.scores) for one in figures),
        metrics=metrics,
        artifacts=[path for name in (PAGE, TABLE, FIGURES) if (path := study.out / name).is_file()],
        say=err.print,
    )


def _values(study: Study) -> dict[str, Any]:
    """The paths of a world's parts, for ${values.NAME}."""
    world = study.out / "world"
    return {"dataset": str(world / "dataset"), "untrained_wan": str(world / "wan"), "wan": str(world / "wan_trained")}


def _make_world(study: Study, world: WorldConfig) -> int:
    """Make the dataset, a tiny Wan, and the Wan folder from which all rows start; returns the exit code."""
    values = _values(study)
    trained, start = Path(values["wan"]), study.found(world.start)
    keys = start if isinstance(start, dict) else read_tree(Path(start))
    claim(study.out / "world" / WORLD, {**world.dataset, "start": keys}, what="a world")
    if trained.exists():
        return 0
    err.print(f"{study.out / 'world'}: dataset and tiny Wan")
    write_dataset(Path(values["dataset"]), world.dataset)
    write_wan(Path(values["untrained_wan"]), seed=int(world.dataset["seed"]))
    run = study.out / "runs" / _VIDEO_DIT
    stage = {
        "name": _VIDEO_DIT,
        "kind": "train",
        "config": start,
        "needs": [world.cache],
        "overrides": {"out": str(run), "model.wan": values["untrained_wan"]},
        "carries": {"data.cache": f"${{stages.{world.cache}.out}}"},
    }
    code = run_curriculum(study.curriculum(values=values, stages=[stage]), wait=True, at_end=lambda status: None)
    if not code:
        from flowmask.trainer.predict.export import export

        export(str(run), format="diffusers", out=trained)
    return code


def _describe(study: Study) -> int:
    """Print the trials that would be trained and scored; writes nothing."""
    printer.print(f"{study.path}: {len(study.config.rows)} rows, out {study.out}")
    for trial in study.trials():
        what = "trained and scored" if trial.row.of is None else f"scored, with the weights of {trial.row.of}"
        printer.print(f"{trial.evaluation.name}: {what}; {trial.row.title}")
    return 0
