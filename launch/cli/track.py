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
) -> None:
    """Send MLflow the metrics and files that it lacks of an ended run, and its end. A killed run is FAILED."""
    from flowmask.trainer.track.tracking import replay

    if not replay(run, timeout_s=timeout_s, uri=uri, warn=lambda line: console.print(line)):
        console.print("MLflow has not accepted everything; the same command continues")
        raise typer.Exit(1)
    console.print(f"MLflow has everything of {run}")


def offer(run: str, path: Path, *, to: str) -> None:
    """Record a file made from a checkpoint, so that the next `flowmask track` uploads it to the MLflow run."""
    from flowmask.trainer.track.tracking import offer_artifact

    if offer_artifact(run, path, to=to):
        console.print(f"`flowmask track {run}` uploads it to MLflow")
