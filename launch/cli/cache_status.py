"""The output of `flowmask cache status`: bars, rate, time left, and the unit of each worker."""

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flowmask.data_pipeline.build.status import CacheStatus, Count, LeaseStatus
from flowmask.launch.progress import duration
from flowmask.models.safe.words import printable

_LEASES_SHOWN = 20
_COLOURS = {"alive": "green", "expired": "yellow", "dead": "red"}
_PHASES = {
    "plan": "planning",
    "text": "encoding sentences",
    "clips": "encoding clips",
    "finalise": "all units done, writing the index",
    "complete": "complete",
}


def show_status(status: CacheStatus, console: Console) -> None:
    """Print the status of a build."""
    console.print(Group(*_lines(status)))


def _lines(status: CacheStatus) -> list[RenderableType]:
    complete = status.phase == "complete"
    lines: list[RenderableType] = [
        Text.assemble((status.folder, "bold"), ": ", (_PHASES[status.phase], "green" if complete else "cyan"))
    ]
    if status.clips:
        lines.append(_bars(status))
    if complete:
        lines.append(Text(f"{status.examples:,} examples"))
    else:
        lines.append(_pace(status))
    if status.quarantined:
        lines.append(Text(f"{status.quarantined:,} in quarantine", "yellow"))
    if status.leases:
        lines.append(_leases(status.leases))
    return lines


def _bars(status: CacheStatus) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)
    counts = {"sentences": status.sentences, "clips": status.clips, "shards": status.units}
    for name, count in counts.items():
        if count is not None:
            table.add_row(name, _bar(count), f"{count.done:,} / {count.total:,}", _percent(count))
    return table


def _bar(count: Count) -> ProgressBar:
    return ProgressBar(total=max(count.total, 1), completed=count.done if count.total else 1, width=40)


def _percent(count: Count) -> str:
    return f"{100 * count.done / count.total:.1f} %" if count.total else "-"


def _pace(status: CacheStatus) -> Text:
    if not status.workers_alive:
        return Text("no worker is running; the same `flowmask cache build` continues where it stopped", "yellow")
    parts = [f"{status.workers_alive} worker{'s' if status.workers_alive != 1 else ''} alive"]
    if status.rate_per_s:
        per_s, what = status.rate_per_s, "sentences" if status.phase == "text" else "clips"
        parts.append(f"{per_s:.1f} {what}/s" if per_s >= 1 else f"{60 * per_s:.1f} {what}/min")
    if status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} left{' of this phase' if status.phase == 'text' else ''}")
    return Text(", ".join(parts))


def _leases(leases: list[LeaseStatus]) -> RenderableType:
    table = Table("unit", "host", "pid", "held for", "last heartbeat", "", box=None, padding=(0, 2, 0, 0))
    worst = sorted(leases, key=lambda lease: (lease.state == "alive", -lease.silent_s))
    for lease in worst[:_LEASES_SHOWN]:
        state = Text(lease.state, _COLOURS[lease.state])
        ages = duration(lease.held_s), f"{duration(lease.silent_s)} ago"
        table.add_row(printable(lease.unit), printable(lease.host), str(lease.pid), *ages, state)
    hidden = len(leases) - _LEASES_SHOWN
    return Group(table, Text(f"... and {hidden} more", "dim")) if hidden > 0 else table
