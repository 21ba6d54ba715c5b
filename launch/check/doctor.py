"""`flowmask doctor`: checks whether this machine can run the job. One line per check: pass, warn or fail, and the fix.

Runs and shows the checks of questions.py. A check that raises is a failed finding, not an error.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowmask.launch.check.questions import QUESTIONS, Question, Subject
from flowmask.launch.finding import Finding

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "unknown": "cyan"}


def examine(subject: Subject, questions: Sequence[Question] = QUESTIONS) -> list[Finding]:
    """Run every check. One that raises is a failed finding with the exception."""
    findings = []
    for question in questions:
        try:
            findings += question(subject)
        except Exception as error:  # noqa: BLE001 - any error here is a finding
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            findings.append(Finding(question.__name__, "fail", what, "report this line as a bug"))
    return findings


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings as a table, each fix below its fault."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        fix = f"\nfix: {finding.fix}" if finding.fix and finding.state != "pass" else ""
        said = Text.assemble(finding.said, (fix, "dim"))
        table.add_row(Text(finding.state, _COLOURS[finding.state]), finding.what, said)
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in _COLOURS}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count or state != "unknown"))


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`ok` is false if any check failed."""
    told = [
        {"check": f.what, "state": f.state, "found": f.said, "fix": "" if f.state == "pass" else f.fix}
        for f in findings
    ]
    return {"ok": all(finding.state != "fail" for finding in findings), "checks": told}
