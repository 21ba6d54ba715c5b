"""`flowmask evaluate --try-settings`: its output."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flowmask.launch.cli.words import load_wan_libraries, say_json
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.next_steps import say_next
from flowmask.models.errors import UserError


def show_settings(config: Path, overrides: Sequence[str], *, as_json: bool) -> None:
    """Score each setting in this process, and print a table."""
    from flowmask.launch.jobs import EvaluateJob, load_kind

    job = load_kind(config, EvaluateJob, overrides)
    if job.launch.cluster == "slurm":
        raise UserError("--try-settings runs in this process only; run it in an allocation with launch.cluster=local")
    load_wan_libraries()
    from flowmask.launch.progress import bar
    from flowmask.models.device import gpu_holds
    from flowmask.trainer.score.try_settings import TRIED, try_settings

    with gpu_holds("`evaluate --try-settings`", fix=EvaluateJob.LESS_MEMORY), bar() as on_progress:
        tried = try_settings(job.for_room(), on_progress=on_progress, say=err.print)
    if as_json:
        say_json([one.to_json() for one in tried])
        return
    table = Table(*TRIED, "J&F", "J", "F")
    for one in tried:
        named = (str(value).lower() for value in one.conventions.values())
        table.add_row(*named, *(f"{one.scores[name]:.2f}" for name in ("jf", "j", "f")))
    console.print(table)
    best = " ".join(f"conventions.{name}={str(value).lower()}" for name, value in tried[0].conventions.items())
    say_next(f"flowmask evaluate {{path}} {best}", config)
