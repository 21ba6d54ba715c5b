"""The two pictures of a study as SVG: each row's scores next to the published ones, and its loss curve."""

import html
from collections.abc import Sequence

from flowmask.launch.reproduce.figures import RowFigures

_LEFT, _WIDTH, _ROW, _TOP, _RIGHT = 300, 520, 28, 26, 20
_SMALL_WIDTH, _SMALL_HEIGHT = 150, 60
_OURS, _THEIRS = "#2f6fde", "#e07b00"


def scores(figures: Sequence[RowFigures]) -> str:
    """A line for each row: a ring for the published score, a dot for each seed, a bar for the interval."""
    height = _TOP + _ROW * len(figures) + 30
    parts = [f'<svg viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height}" style="max-width:52rem;font-size:13px" role=img>']
    for tick in range(0, 101, 20):
        x = _across(tick)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{height - 28}" stroke="#8884"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor=middle fill=currentColor>{tick}</text>')
    for place, one in enumerate(figures):
        parts += _line(one, _TOP + _ROW * (place + 0.5))
    return "".join([*parts, "</svg>"])


def _line(one: RowFigures, y: float) -> list[str]:
    title = html.escape(one.row.title)
    found = [f'<text x="{_LEFT - 12}" y="{y + 4:.1f}" text-anchor=end fill=currentColor>{title}</text>']
    if one.mean is not None and one.mean.interval is not None:
        low, high = (_across(value) for value in one.mean.interval)
        found.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{_OURS}" stroke-width=7 opacity=.3 />')
    for seed, value in one.by_seed.items():
        tip = f"<title>seed {seed}: {value:.1f}</title>"
        found.append(f'<circle cx="{_across(value):.1f}" cy="{y:.1f}" r=4 fill="{_OURS}">{tip}</circle>')
    if one.row.published is not None:
        ring = f'<circle cx="{_across(one.row.published):.1f}" cy="{y:.1f}" r=6 fill=none stroke="{_THEIRS}"'
        found.append(f"{ring} stroke-width=2><title>published: {one.row.published:.1f}</title></circle>")
    return found


def _across(percent: float) -> float:
    return _LEFT + _WIDTH * min(100.0, max(0.0, percent)) / 100


def losses(figures: Sequence[RowFigures]) -> list[str]:
    """A small chart for each trained row: loss over steps, one line for each seed."""
    return [_loss(one) for one in figures if any(len(curve) > 1 for curve in one.curves)]


def _loss(one: RowFigures) -> str:
    steps = max(step for curve in one.curves for step, _ in curve)
    values = [value for curve in one.curves for _, value in curve]
    low, span = min(values), max(max(values) - min(values), 1e-12)
    lines = []
    for curve in one.curves:
        points = (
            f"{step / steps * _SMALL_WIDTH:.1f},{_SMALL_HEIGHT - (value - low) / span * _SMALL_HEIGHT:.1f}"
            for step, value in curve
        )
        lines.append(f'<polyline points="{" ".join(points)}" fill=none stroke="{_OURS}" stroke-width=1.2 opacity=.7 />')
    said = f"{html.escape(one.row.title)}<br><small>{max(values):.3g} to {low:.3g}, {steps:,} steps</small>"
    box = f"-2 -2 {_SMALL_WIDTH + 4} {_SMALL_HEIGHT + 4}"
    return f'<svg viewBox="{box}" style="width:12rem" role=img>{"".join(lines)}</svg><p>{said}</p>'
