"""`flowmask track`, and what a person is told of files that could be sent."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.console import out as console


def track(
    run: Annotated[Path, typer.Argument(help="A run folder that nobody trains now")],
    timeout_s: Annotated[float, typer.Option(min=0, help="Seconds after which to give up")] = 600.0,
    uri: Annotated[str | None, typer.Option(help="The server; default: the one that you trained it with")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Upload the exports that were written of it too")] = False,
) -> None:
    """Send MLflow what it missed of an ended run, and how that ended. A run that died is FAILED."""
    from flowmask.trainer.track.tracking import ask_for_weights, replay, where_to_look

    if weights:
        ask_for_weights(run)
    if not replay(run, timeout_s=timeout_s, uri=uri, warn=lambda line: console.print(line)):
        console.print("MLflow has not taken everything; the same command goes on")
        raise typer.Exit(1)
    console.print(f"MLflow has all of {run}")
    if uri is None and (page := where_to_look(run)):
        console.print(page)


def offer(checkpoint: str, path: Path, *, to: str, weights: bool = False) -> None:
    """Let the MLflow run of a checkpoint have what was made from it, when somebody sends it."""
    from flowmask.trainer.track.tracking import offer_artifact

    if (run := offer_artifact(checkpoint, path, to=to, weights=weights)) is not None:
        console.print(f"`flowmask track {run}{' --weights' if weights else ''}` uploads it to MLflow")
