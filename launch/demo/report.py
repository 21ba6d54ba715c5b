"""The figures of a demo, read from the files of its jobs, and the table at the end."""

import json
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from flowmask.models.errors import TrainingError
from flowmask.trainer.track.tracking import where_to_look

EDGE_STEPS = 20  # steps over which the first and the last loss are averaged


def collect(out: Path) -> dict[str, Any]:
    """Read the scores, losses and speeds of the demo in `out`: every figure was measured there."""
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    rows = _rows(out / "runs" / "dit")
    durations = json.loads((out / "durations.json").read_text())
    manifest = json.loads((out / "cache" / "manifest.json").read_text())
    losses = [row["loss"] for row in rows]
    edge = max(1, min(EDGE_STEPS, len(losses) // 2))
    return {
        **{name: scores[name] for name in ("jf", "j", "f", "jf_target", "n_acc", "t_acc", "final")},
        "jf_right_text": scores["shuffled_text"]["jf_right"],
        "jf_shuffled_text": scores["shuffled_text"]["jf_shuffled"],
        "decoder_jf": scores["decoder"]["jf"],
        "train_loss_first": fmean(losses[:edge]),
        "train_loss_last": fmean(losses[-edge:]),
        "cache_clips_per_s": round(manifest["clips"] / durations["cache_s"], 2),
        "train_samples_per_s": round(harmonic_mean(row["examples_per_s"] for row in rows[edge // 2 :]), 2),
    }


def refuse_skips(run: Path) -> None:
    """Raises TrainingError if a step of a run was skipped; a healthy run skips none."""
    steps = [row["step"] for row in _rows(run) if row.get("skipped")]
    if steps:
        raise TrainingError(
            f"{run} skipped {len(steps)} steps ({', '.join(map(str, steps[:5]))}{', ...' if steps[5:] else ''}), "
            "which a healthy demo never does; see the reason in log.txt there"
        )


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def show(out: Path, report: dict[str, Any], console: Console) -> None:
    """Print the report as a short table, and where to look next."""
    table = Table(title="FlowMask demo: held-out synthetic videos", show_header=False, title_justify="left")
    share = 100 * report["jf_shuffled_text"] / report["jf_right_text"] if report["jf_right_text"] else float("nan")
    table.add_row("J&F", f"{report['jf']:.1f}   (J {report['j']:.1f}, F {report['f']:.1f})")
    table.add_row("of sentences that name something", f"{report['jf_target']:.1f}")
    table.add_row("N-acc, T-acc, Final", f"{report['n_acc']:.1f}, {report['t_acc']:.1f}, {report['final']:.1f}")
    table.add_row(
        "with other sentences", f"{report['jf_shuffled_text']:.1f}   {share:.0f} % of {report['jf_right_text']:.1f}"
    )
    table.add_row("mask decoder alone", f"{report['decoder_jf']:.1f}")
    table.add_row("training loss", f"{report['train_loss_first']:.3f} -> {report['train_loss_last']:.3f}")
    table.add_row("cache", f"{report['cache_clips_per_s']:.1f} clips/s")
    table.add_row("training", f"{report['train_samples_per_s']:.1f} examples/s")
    table.add_row("all of it", f"{report['wall_s'] / 60:.1f} min")
    console.print(table)
    for what, where in (
        ("report", out / "evaluate" / "report.html"),
        ("overlay video", out / "predict" / "overlay.mp4"),
        ("losses", _losses(out)),
        ("figures", out / "report.json"),
    ):
        console.print(f"{what:<14} {where}")


def _losses(out: Path) -> str:
    """The command that serves the demo's MLflow, and the page of its runs."""
    runs = [where_to_look(out / "runs" / name, experiment=True) for name in ("dit", "decoder")]
    return next((page for page in runs if page), "MLflow has not taken them; `flowmask track` sends them")
