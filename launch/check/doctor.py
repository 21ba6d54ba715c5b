"""`flowmask doctor`: is this machine fit for the job? One line a question: pass, warn or fail, and the fix.

Owns the order of the questions and how the answers are shown; launch/check/doctor_checks.py asks them. Never raises
for what it finds: a check that breaks is a failed check.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["pass", "warn", "fail"]
_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Finding:
    """One line: what was asked, how it stands, what was found, and what to do about it."""

    check: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Subject:
    """What is examined: this machine, and what a config names, if one was given."""

    out: Path
    wan: Path | None = None
    data: tuple[Path, ...] = ()
    tracking_uri: str | None = None
    cluster: str = "local"
    partition: str | None = None


Check = Callable[[Subject], list[Finding]]


def subject_of(config: Path | None, overrides: Sequence[str] = ()) -> Subject:
    """What a config names, read leniently: a config that does not validate is another command's business."""
    from flowmask.launch.config import read_tree

    if config is None:
        return Subject(out=Path())
    tree = OmegaConf.create(read_tree(config, overrides))

    def at(key: str) -> Any:
        return OmegaConf.select(tree, key)

    sources = at("data")
    entries = list(sources) if OmegaConf.is_list(sources) else [sources]
    roots = [entry[key] for entry in entries if entry for key in ("root", "cache") if entry.get(key)]
    return Subject(
        out=Path(at("out") or "."),
        wan=Path(at("model.wan")) if at("model.wan") else None,
        data=tuple(Path(root) for root in roots),
        tracking_uri=at("tracking.uri"),
        cluster=at("launch.cluster") or "local",
        partition=at("launch.partition"),
    )


def examine(subject: Subject, checks: Sequence[Check] | None = None) -> list[Finding]:
    """Ask every question; a check that breaks is a failed one, with what broke it."""
    from flowmask.launch.check.doctor_checks import CHECKS

    findings = []
    for check in CHECKS if checks is None else checks:
        try:
            findings += check(subject)
        except Exception as error:  # noqa: BLE001 - whatever is wrong here is what a person wants to know
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            findings.append(Finding(check.__name__, "fail", what, "report this, with the whole line"))
    return findings


def show(findings: Sequence[Finding], console: Console) -> None:
    """The findings as a table, the fixes beneath what they mend."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.state]
        fix = f"\n[dim]fix: {escape(finding.fix)}[/]" if finding.fix and finding.state != "pass" else ""
        table.add_row(f"[{colour}]{finding.state}[/]", finding.check, escape(finding.found) + fix)
    console.print(table)
    counts = {state: sum(finding.state == state for finding in findings) for state in _COLOURS}
    console.print(", ".join(f"{count} {state}" for state, count in counts.items()), highlight=False)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`ok` is false if any check failed."""
    ok = all(finding.state != "fail" for finding in findings)
    told = [replace(finding, fix="") if finding.state == "pass" else finding for finding in findings]
    return {"ok": ok, "checks": [asdict(finding) for finding in told]}
