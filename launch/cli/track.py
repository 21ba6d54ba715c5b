"""`flowmask track`, `flowmask profile`, `flowmask report`, and the hint to upload new files to MLflow."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.words import Run
from flowmask.launch.console import out as console


def track(
    run: Annotated[Path, typer.Argument(help="A run folder whose training has ended")],
    timeout_s: Annotated[float, typer.Option(min=0, help="Time limit in seconds")] = 600.0,
    uri: Annotated[
        str | None, typer.Option(help="Address of the MLflow server; default: the one of the training")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Upload the exports of the run too")] = False,
) -> None:
    """Send MLflow the metrics and files that it lacks of an ended run, and its end. A killed run is FAILED."""
    from flowmask.trainer.track.tracking import ask_for_weights, replay, where_to_look

    if weights:
        ask_for_weights(run)
    if not replay(run, timeout_s=timeout_s, uri=uri, warn=lambda line: console.print(line)):
        console.print("MLflow has not accepted everything; the same command continues")
        raise typer.Exit(1)
    console.print(f"MLflow has everything of {run}")
    if uri is None and (page := where_to_look(run)):
        console.print(page)


def profile(
    run: Run,
    steps: Annotated[int, typer.Option(min=1, max=50, help="Steps to profile")] = 3,
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds to wait for the traces")] = 1800.0,
) -> None:
    """torch's profile of the next steps of a live training, which goes on: a Chrome trace of each rank."""
    from flowmask.launch.watch.profile import TRACES
    from flowmask.launch.watch.profile import profile as profile_run

    folder = profile_run(run, steps=steps, timeout_s=timeout_s)
    console.print(f"{len(list(folder.glob(TRACES)))} traces in {folder}; open one at https://ui.perfetto.dev")


def report(
    run: Run, out: Annotated[Path | None, typer.Option(help="The HTML file; default: RUN/report.html")] = None
) -> None:
    """One HTML page of a training: how each rank spends its time, which one holds the others up and why, memory."""
    from flowmask.trainer.explain.run_page import page_file, write_run_page

    file = page_file(run, out)
    file.refuse()
    console.print(str(write_run_page(run, file)))
    console.print(f"wrote {file.out}")


def offer(checkpoint: str, path: Path, *, to: str, weights: bool = False) -> None:
    """Record a file made from a checkpoint, so that the next `flowmask track` uploads it to the MLflow run."""
    from flowmask.trainer.track.tracking import offer_artifact

    if (run := offer_artifact(checkpoint, path, to=to, weights=weights)) is not None:
        console.print(f"`flowmask track {run}{' --weights' if weights else ''}` uploads it to MLflow")
