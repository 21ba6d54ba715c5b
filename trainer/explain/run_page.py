"""`flowmask report`: one HTML page about the time of each rank, the slowest rank, and the cause."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.page import Cell
from flowmask.data_pipeline.show.page_file import PageFile
from flowmask.data_pipeline.show.paint import Rgb
from flowmask.models.errors import CheckpointError
from flowmask.trainer.explain.timeline import TimeSample, aligned, read_timeline
from flowmask.trainer.explain.verdict import Explanation, a_step, explain, recent
from flowmask.trainer.phases import PHASES, REDUCE

PAGE = "report.html"
COLOURS: dict[str, Rgb] = {
    "read": (31, 119, 180),
    "copy": (23, 190, 207),
    "forward": (116, 196, 118),
    "backward": (35, 139, 69),
    "optimizer": (140, 109, 49),
    "save": (148, 103, 189),
    "evaluate": (227, 119, 194),
    "other": (255, 152, 60),
    REDUCE: (189, 189, 189),
}
_WORDS = {REDUCE: "reduce: waits for other ranks", "other": "other work of the process"}
_TALLEST = 4  # medians: taller columns are cut
_MOST_BARS, _MOST_LINES, _MOST_COLUMNS = 32, 8, 120
_LEFT, _WIDTH, _ROW, _HEIGHT = 90, 810, 26, 70


def page_file(run: Path, out: Path | None) -> PageFile:
    """The path of a run's page: RUN/report.html unless another file is given."""
    return PageFile(out or run / PAGE, title="FlowMask run", kind="a run", error=CheckpointError)


def write_run_page(run: Path, file: PageFile) -> Explanation:
    """Write the page and return its verdict; CheckpointError if no timeline has all ranks."""
    samples = read_timeline(run)
    turns = recent(samples)
    if not turns:
        raise CheckpointError(f"{run}: its ranks have no step in common yet; wait for train.log_every_steps more steps")
    ranks = a_step(turns)
    verdict = explain(ranks)
    file.write(run.resolve().name, _body(aligned(samples), turns, ranks, verdict))
    return verdict


def _body(
    all_turns: Sequence[Sequence[TimeSample]],
    turns: Sequence[Sequence[TimeSample]],
    ranks: Sequence[Mapping[str, float]],
    verdict: Explanation,
) -> list[str]:
    newest = turns[-1]
    step_s = max(sum(rank.values()) for rank in ranks) or 1e-9
    waits = [rank.get(REDUCE, 0.0) / step_s for rank in ranks]
    order = _slowest_first(ranks)
    host_gib = max(sample.memory.get("host_memory_gib", 0.0) for sample in newest)
    facts = {
        "step": f"{newest[0].step:,}",
        "ranks": str(len(ranks)),
        "a step": f"{step_s:.3g} s",
        "slowest rank": "none" if verdict.rank is None else str(verdict.rank),
        "in reductions": f"{min(waits):.0%} to {max(waits):.0%}",
        "on the host for a rank, at most": f"{host_gib:.1f} GiB",
    }
    shown = sorted(order[:_MOST_BARS])
    known = turns[0][0].step - turns[0][0].steps + 1
    legend = page.legend({_WORDS.get(phase, phase): tone for phase, tone in COLOURS.items()})
    return [
        page.tiles(facts),
        page.note(f"{verdict} {verdict.advice}".strip()),
        page.heading("One step of each rank"),
        page.paragraph(f"Means over the steps {known:,} to {newest[0].step:,}." + _left_out(len(ranks), _MOST_BARS)),
        legend,
        _bars([(f"rank {rank}", newest[rank].host, ranks[rank]) for rank in shown], longest=step_s),
        page.heading("Over time"),
        page.paragraph(
            "Seconds of a step, one scale for all; a triangle marks a bar that is cut."
            + _left_out(len(ranks), _MOST_LINES)
        ),
        _over_time([t for t in all_turns if len(t) == len(ranks)], sorted(order[:_MOST_LINES])),
        page.heading("Memory and seconds of each rank"),
        _table(newest, ranks),
    ]


def _slowest_first(ranks: Sequence[Mapping[str, float]]) -> list[int]:
    """The ranks by their own time, longest first."""
    return sorted(range(len(ranks)), key=lambda n: ranks[n].get(REDUCE, 0.0) - sum(ranks[n].values()))


def _left_out(ranks: int, most: int) -> str:
    return f" The {most} slowest of {ranks} ranks." if ranks > most else ""


def _bars(rows: Sequence[tuple[str, str, Mapping[str, float]]], *, longest: float) -> str:
    """A bar for each rank with its phases; its length is that of the step."""
    height = _ROW * len(rows) + 24
    parts = []
    for place, (name, host, spent) in enumerate(rows):
        top, x = place * _ROW, float(_LEFT)
        label = f"{html.escape(name)}<title>{html.escape(host)}</title>"
        parts.append(f'<text x="{_LEFT - 10}" y="{top + 16}" text-anchor=end fill=currentColor>{label}</text>')
        for phase in COLOURS:
            wide = max(0.0, spent.get(phase, 0.0)) / longest * _WIDTH
            parts.append(_box(phase, x, top + 3, wide, _ROW - 7, seconds=spent.get(phase, 0.0)))
            x += wide
    for seconds in _ticks(longest):
        x = _LEFT + _WIDTH * seconds / longest
        parts.append(f'<path d="M{x:.1f} 0V{height - 20}" stroke="#8884"/>')
        words = f"{seconds:g} s" if seconds else "0"
        parts.append(f'<text x="{x:.1f}" y="{height - 5}" text-anchor=middle fill=currentColor>{words}</text>')
    return _svg(height, parts)


def _ticks(longest: float) -> list[float]:
    """Round numbers from 0 on: at most four between 0 and `longest`, and none at its very end."""
    power = 10.0 ** math.floor(math.log10(longest))
    apart = next(power * factor for factor in (0.2, 0.25, 0.5, 1, 2) if 0.97 * longest / (power * factor) < 5)
    return [round(number * apart, 12) for number in range(5) if number * apart < 0.97 * longest]


def _over_time(turns: Sequence[Sequence[TimeSample]], ranks: Sequence[int]) -> str:
    """For each rank one column per sample with its phases."""
    chosen = [turns[place] for place in page.spread(len(turns), _MOST_COLUMNS)]
    totals = sorted(sum(map(turn[rank].a_step, COLOURS)) for turn in chosen for rank in ranks)
    tallest = min(totals[-1], _TALLEST * totals[len(totals) // 2]) or 1.0
    wide = _WIDTH / len(chosen)
    parts = []
    for place, rank in enumerate(ranks):
        base = (place + 1) * (_HEIGHT + 14)
        parts.append(f'<text x="{_LEFT - 10}" y="{base - 4}" text-anchor=end fill=currentColor>rank {rank}</text>')
        parts.append(f'<text x="{_LEFT - 10}" y="{base - _HEIGHT + 10}" text-anchor=end fill="#888">')
        parts.append(f"{tallest:.3g} s</text>")
        parts.append(f'<path d="M{_LEFT} {base}H{_LEFT + _WIDTH}" stroke="#8888"/>')
        for column, turn in enumerate(chosen):
            x, y = _LEFT + column * wide, float(base)
            for phase in COLOURS:
                seconds = turn[rank].a_step(phase)
                high = min(seconds / tallest * _HEIGHT, y - base + _HEIGHT)
                y -= high
                parts.append(_box(phase, x, y, max(wide - 0.4, 0.6), high, seconds=seconds, step=turn[rank].step))
            if sum(map(turn[rank].a_step, COLOURS)) > 1.01 * tallest:
                parts.append(f'<path d="M{x + wide / 2:.1f} {base - _HEIGHT - 8}l4 7h-8z" fill="#e66100"/>')
    foot = len(ranks) * (_HEIGHT + 14) + 18
    first, last = chosen[0][0].step, chosen[-1][0].step
    parts.append(f'<text x="{_LEFT}" y="{foot}" fill=currentColor>step {first:,}</text>')
    parts.append(f'<text x="{_LEFT + _WIDTH}" y="{foot}" text-anchor=end fill=currentColor>step {last:,}</text>')
    return _svg(foot + 8, parts)


def _box(phase: str, x: float, y: float, wide: float, high: float, *, seconds: float, step: int | None = None) -> str:
    """A part of a bar; nothing if it is too small to see."""
    if wide < 0.05 or high < 0.05:
        return ""
    where = "" if step is None else f"step {step}, "
    tip = f"<title>{where}{phase} {seconds:.4g} s</title>"
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" fill="rgb{COLOURS[phase]}">{tip}</rect>'
    )


def _svg(height: float, parts: Sequence[str]) -> str:
    box = f"0 0 {_LEFT + _WIDTH + 4} {height:.0f}"
    return f'<svg viewBox="{box}" style="width:100%;font-size:13px" role=img>{"".join(parts)}</svg>'


def _table(newest: Sequence[TimeSample], ranks: Sequence[Mapping[str, float]]) -> str:
    kept = [name for name in ("host", "device", "device_peak") if any(_gib(s, name) is not None for s in newest)]
    phases = [phase for phase in (*PHASES, REDUCE) if any(rank.get(phase, 0.0) > 0 for rank in ranks)]
    largest = {name: max(_gib(sample, name) or 0.0 for sample in newest) for name in kept}
    rows = []
    for sample, rank in zip(newest, ranks, strict=True):
        cells = [Cell(str(sample.rank), sample.rank, head=True), Cell(sample.host)]
        for name in kept:
            gib = _gib(sample, name) or 0.0
            cells.append(Cell(f"{gib:.2f}", gib, bar=100 * gib / largest[name] if largest[name] else None))
        rows.append([*cells, *(_seconds(rank.get(phase, 0.0)) for phase in phases)])
    titles = [f"{name.replace('_', ' ')} GiB" for name in kept]
    return page.table(["rank", "on", *titles, *(f"{phase} s" for phase in phases)], rows)


def _seconds(value: float) -> Cell:
    return Cell(f"{value:.3g}" if value >= 1e-4 else "0", value)


def _gib(sample: TimeSample, name: str) -> float | None:
    place, _, peak = name.partition("_")
    return sample.memory.get(f"{place}_memory{'_' + peak if peak else ''}_gib")
