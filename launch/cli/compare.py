"""`flowmask compare`: prints the result."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flowmask.launch.console import out as console
from flowmask.launch.next_steps import say_next

Evaluations = Annotated[
    list[Path], typer.Argument(help="Two or more evaluations: the `out` of `evaluate`, or its scores.json")
]


def compare(
    evaluations: Evaluations,
    out: Annotated[
        Path | None, typer.Option(help="Also write an HTML page: scatter plot, and the largest changes")
    ] = None,
) -> None:
    """Compare evaluations in pairs on the expressions that they share, with confidence intervals over videos."""
    from flowmask.trainer.score.compare.comparison_page import label, page_file, said, signed, title_of, write_page
    from flowmask.trainer.score.compare.differences import compare as differences

    file = page_file(out) if out is not None else None
    if file is not None:
        file.refuse()
    comparisons = differences(evaluations)
    for number, path in enumerate(evaluations):
        console.print(f"{label(number)}  {path}")
    for number, comparison in enumerate(comparisons, 1):
        first, other = label(0), label(number)
        table = Table("mean over both", first, other, f"{other} - {first}", "95 % interval")
        for name, one in comparison.metrics.items():
            table.add_row(title_of(name), f"{one.first:.2f}", f"{one.other:.2f}", signed(one.value), said(one.interval))
        console.print(table)
        console.print(comparison.counts(first=first, other=other))
    if file is not None:
        write_page(file, comparisons)
        console.print(f"wrote {file.out}")
    else:
        say_next("the same command with --out PAGE.html shows the largest changes")
