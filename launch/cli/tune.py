"""`flowmask tune`: what it prints."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flowmask.launch.cli.words import ConfigFile, Overrides, say_loading
from flowmask.launch.console import out as console

if TYPE_CHECKING:
    from flowmask.launch.tune.tune import Tuned


def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="How long it may take")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="A new YAML file for the config with the fastest settings")] = None,
) -> None:
    """Time settings of a training or a cache build here; none changes what is learned or written. Shows the fastest."""
    began = time.monotonic()  # what is imported now takes seconds
    say_loading()
    from flowmask.launch.tune.tune import tune as search

    found = search(config, overrides or [], minutes=minutes, out=out, began=began)
    console.print(_table(found))
    for timing in found.timings:
        if timing.said and not timing.planned:
            console.print(f"{timing.label}: {timing.said}")
    planned = sum(timing.planned for timing in found.timings)
    if planned:
        console.print(f"not timed, as by `flowmask plan` they do not fit: {planned} settings")
    if found.time_is_over:
        console.print(f"the time was over before all was tried: --minutes {2 * minutes:g} tries more")
    if not found.best.changes:
        console.print("the config as given is the fastest")
    else:
        console.print(f"the same by hand: {found.best.label}")
    if out is not None:
        console.print(f"wrote {out}")


def _table(found: "Tuned") -> Table:
    table = Table(f"s a {found.unit}", "x as given", "waits for data", "GPU GiB", "settings", box=None)
    for timing in found.timings:
        if timing.unit_s is None:
            continue
        speed_up = found.speed_up(timing)
        table.add_row(
            f"{timing.unit_s:.4g}",
            "" if speed_up is None else f"{speed_up:.2f}",
            f"{timing.waits:.0%}",
            "" if timing.device_gib is None else f"{timing.device_gib:.1f}",
            f"{timing.label}{' (fastest)' if timing is found.best else ''}",
        )
    return table
