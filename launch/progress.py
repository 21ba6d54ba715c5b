"""Progress of a running job: rich bars on a terminal, plain lines elsewhere; and the table of scores at the end."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from flowmask.launch.console import err
from flowmask.launch.console import out as printer

if TYPE_CHECKING:
    from flowmask.data_pipeline.build.progress import BuildProgress
    from flowmask.trainer.score.results import Scores

Update = Callable[[str, int, int], None]  # what, done, total


@contextmanager
def bar(*, show: bool = True) -> Iterator[Update]:
    """A progress bar, updated with (what, done, total); a new `what` starts a new line. Silent without a terminal."""
    columns = (
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not (show and err.is_terminal)) as progress:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield update


@contextmanager
def told(*, every_s: float = 30.0) -> Iterator[Update]:
    """A progress bar; without a terminal a line at each new `what`, and one every `every_s` seconds."""
    with bar() as update:
        if err.is_terminal:
            yield update
            return
        ended, last, began = threading.Event(), ["starting", 0, 1], time.monotonic()

        def say() -> None:
            what, done, total = last
            err.print(f"{what}: {done} of {total}, {duration(time.monotonic() - began)} since the start")

        def on_progress(what: str, done: int, total: int) -> None:
            last[:] = what, done, total
            if what not in seen:
                seen.add(what)
                say()

        def repeat() -> None:
            while not ended.wait(every_s):
                say()

        seen: set[str] = set()
        repeating = threading.Thread(target=repeat, name="progress", daemon=True)
        repeating.start()
        try:
            yield on_progress
        finally:
            ended.set()
            repeating.join()


@contextmanager
def cache_progress(out: Path, *, show: bool) -> Iterator[Callable[["BuildProgress"], None]]:
    """A bar for each phase of a build; without a terminal one line at the start of the phase."""
    seen: set[str] = set()
    with bar(show=show) as update:

        def on_progress(progress: "BuildProgress") -> None:
            new = progress.phase not in seen
            seen.add(progress.phase)
            if progress.phase in ("text", "clips"):
                update(progress.phase, progress.done, progress.total)
            if show and progress.note:
                err.print(f"{out}: {progress.note}")
            elif show and new and not err.is_terminal:
                err.print(f"{out}: {progress.phase}")

        yield on_progress


def show_scores(scores: "Scores", out: Path, *, archive: bool = False) -> None:
    """Print the scores as a table to stdout, and the paths of the report and, with `archive`, of submission.zip."""
    from flowmask.trainer.score.metrics import shown_in

    shown = shown_in("progress")
    table = Table("", *(metric.title for metric in shown.values()))
    for what, values in (("all expressions", scores.totals), ("mask decoder alone", scores.decoder or {})):
        known = [(metric, values.get(name)) for name, metric in shown.items()]
        if any(value is not None for _, value in known):
            table.add_row(what, *(metric.say(value) if value is not None else "" for metric, value in known))
    if scores.shuffled_text:
        table.add_row("other sentences", f"{scores.shuffled_text['jf_shuffled']:.1f}")
        table.add_row("  same expressions, own sentence", f"{scores.shuffled_text['jf_right']:.1f}")
    if table.row_count:
        printer.print(table)
    if None not in scores.nothing.values():
        n_acc, t_acc, final, target = (scores.nothing[name] for name in ("n_acc", "t_acc", "final", "jf_target"))
        printer.print(
            f"N-acc {n_acc:.1f}, T-acc {t_acc:.1f}, Final {final:.1f}; J&F of sentences with a target {target:.1f}"
        )
    if scores.protocol is not None:
        printer.print(_protocol_table(scores.protocol))
    if scores.presence is not None:
        emptied = sum(seen < scores.presence["threshold"] for seen in scores.presences.values())
        printer.print(
            f"presence threshold {scores.presence['threshold']:.4g}: {emptied} expressions below it have empty masks"
        )
    if scores.note:
        printer.print(scores.note)
    counted = {"video": scores.videos, "expression": scores.expressions, "frame": scores.frames}
    counts = ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counted.items())
    printer.print(f"{counts}; report: {out / 'report.html'}")
    if archive:
        printer.print(f"for the benchmark's server: {out / 'submission.zip'}")


def _protocol_table(protocol: Mapping[str, Any]) -> Table:
    """The numbers of a benchmark's protocol under its default convention, one per line."""
    from flowmask.trainer.score.protocols import number_title

    rows = protocol["tables"][protocol["convention"]]
    others = [name for name in protocol["tables"] if name != protocol["convention"]]
    table = Table("", *rows, title=f"protocol {protocol['name']}, convention {protocol['convention']}, in percent")
    table.caption = f"also in scores.json: {', '.join(others)}" if others else None
    for name in next(iter(rows.values())):
        values = (row[name] for row in rows.values())
        table.add_row(number_title(name), *("" if value is None else f"{value:.2f}" for value in values))
    return table


def duration(seconds: float) -> str:
    """Seconds as text, for example `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    whole = timedelta(seconds=round(seconds))
    hours, minutes = divmod(whole.seconds // 60, 60)
    days = f"{whole.days} d " if whole.days else ""
    return f"{days}{hours} h {minutes:02d} min"
