"""`flowmask track`, and the hint to upload new files to MLflow."""

from pathlib import Path
from typing import Annotated

import typer

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


def offer(checkpoint: str, path: Path, *, to: str, weights: bool = False) -> None:
    """Record a file made from a checkpoint, so that the next `flowmask track` uploads it to the MLflow run."""
    from flowmask.trainer.track.tracking import offer_artifact

    if (run := offer_artifact(checkpoint, path, to=to, weights=weights)) is not None:
        console.print(f"`flowmask track {run}{' --weights' if weights else ''}` uploads it to MLflow")
