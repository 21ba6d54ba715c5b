"""What the commands of `flowmask` have in common: arguments, and how a job is started from one."""

from pathlib import Path
from typing import Annotated, Optional

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, or the name of one that `flowmask configs` lists")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - Typer reads this annotation
    typer.Argument(help="KEY=VALUE, as many as you like, for example train.lr=1e-4 out=runs/mine"),
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="On SLURM: show the progress until the job is done, or leave")
]


def run_job(kind: str, config: Path, overrides: list[str] | None, *, wait: bool) -> None:
    """Run or submit the job of a config, and exit with its code."""
    from flowmask.launch.dispatch import start

    code = start(kind, config, overrides or [], wait=wait)
    if code:
        raise typer.Exit(code)
