"""The results of `flowmask tune` as a table and lines."""

from rich.console import Console
from rich.table import Table

from flowmask.launch.tune.tune import Tuned


def show(found: Tuned, console: Console) -> None:
    """Print every timed candidate, the reasons of those that were not timed, and the fastest."""
    console.print(_table(found))
    for timing in found.timings:
        if timing.said and not timing.planned:
            console.print(f"{timing.label}: {timing.said}")
    if planned := sum(timing.planned for timing in found.timings):
        console.print(f"not timed, since they do not fit by the estimates of `flowmask plan`: {planned} settings")
    fastest = found.best.label if found.best.changes else "the config as given"
    console.print(f"fastest: {fastest}")


def _table(found: Tuned) -> Table:
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
