"""Prints a plan as tables: sizes in GB (10^9 bytes), the settings that fit on each GPU, and the assumptions."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flowmask.launch.plan.cache import CachePlan
from flowmask.launch.plan.evaluate import EvaluatePlan
from flowmask.launch.plan.memory import CONTEXT_BYTES, FRAGMENTATION, DeviceMemory
from flowmask.launch.plan.settings import SettingPlan
from flowmask.launch.plan.train import GPUS_GB, TrainPlan


def show(found: TrainPlan | CachePlan | EvaluatePlan, console: Console) -> None:
    """Print a plan."""
    if isinstance(found, TrainPlan):
        _show_training(found, console)
    elif isinstance(found, CachePlan):
        _show_cache(found, console)
    else:
        _show_evaluation(found, console)
    for note in found.notes:
        console.print(f"assumed: {note}", markup=False, highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes in a suitable unit."""
    return _in_units(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))


def work(flop: float) -> str:
    return _in_units(flop, (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)))


def _in_units(count: float, units: Sequence[tuple[str, float]]) -> str:
    unit, worth = next((unit for unit in units if count >= unit[1]), units[-1])
    return f"{count / worth:,.1f} {unit}" if count >= worth else f"{count / worth:,.2g} {unit}"


def hours(count: float) -> str:
    """Hours; from two days on also days; below a minute seconds."""
    if count >= 48:
        return f"{count:,.0f} h ({count / 24:,.1f} days)"
    return f"{count:.1f} h" if count >= 1 else f"{count * 60:.1f} min" if count * 60 >= 1 else f"{count * 3600:.2g} s"


def _facts(rows: list[tuple[str, str]], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def _show_training(found: TrainPlan, console: Console) -> None:
    rows = [
        ("module", f"{found.kind}, {found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M trained"),
        ("clips", _shares(found.shapes)),
        ("planned for", f"{found.largest}" + (f", {found.tokens:,} tokens" if found.tokens else "")),
        (
            "work",
            f"{work(found.flop_per_example)} per example, {work(found.flop_per_step)} per step, without recomputation",
        ),
        ("run", _length(found)),
        ("disk", f"{size(found.checkpoint_bytes)} per checkpoint, {size(found.disk_bytes)} at most"),
        *_saves(found),
        *_decoder(found.decoder_share),
    ]
    _facts(rows, console)
    console.print(_settings(found))
    console.print(_worlds(found))
    _recommend(found, console)
    console.print(
        f"time: {_speed(found)}. GPU: the largest of start, pass and step, plus {FRAGMENTATION:.0%} for fragments "
        f"and {CONTEXT_BYTES / 1e9} GB for CUDA and NCCL. Host: per rank.",
        highlight=False,
    )


def _length(found: TrainPlan) -> str:
    """Steps and epochs, if they are known."""
    steps = "steps unknown" if found.steps is None else f"{found.steps:,} steps"
    if found.epochs_of_each:
        return f"{steps}, epochs of each cache: {', '.join(f'{epochs:.2f}' for epochs in found.epochs_of_each)}"
    return f"{steps}, {'epochs unknown' if found.epochs is None else f'{found.epochs:.2f} epochs'}"


def _saves(found: TrainPlan) -> list[tuple[str, str]]:
    """The share of the time that remains after node failures, and the best save interval."""
    saves, costs = found.saves, found.saves.costs
    kept = f"every {hours(saves.every_s / 3600)} keep {saves.effective:.2%}"
    best = f"best is every_steps={saves.best_steps}: {saves.best_effective:.2%}"
    failures = f"one in {costs.mtbf_s / 3600:,.0f} h, {costs.restart_s / 60:g} min to continue"
    return [("saves", f"{kept}; {best}"), ("failures", f"{failures} (stated: --node-mtbf-h, --restart-min)")]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _settings(found: TrainPlan) -> Table:
    ranks = found.chosen.setting.ranks
    title = f"\nmemory of one of {ranks} GPU{'s' if ranks > 1 else ''} in GB; * the config's setting"
    columns = ("", "ZeRO", "recompute", "states", "grads", "buffers", "pass", "start", "GPU", "fits", "host", "work")
    table = _table(title, *columns)
    for plan in found.settings:
        device, setting = plan.device, plan.setting
        sizes = (device.states, device.gradients, device.buffers, device.activations, device.start, device.peak)
        table.add_row(
            "*" if plan == found.chosen else "",
            f"{setting.zero_stage}{' offload' if setting.offload else ''}",
            setting.recompute,
            *(f"{value / 1e9:.1f}" for value in sizes),
            next((str(gb) for gb in GPUS_GB if device.peak <= gb * 1e9), "none"),
            f"{plan.host.peak / 1e9:.1f}",
            f"x{plan.slowdown:.2f}",
        )
    return table


def _worlds(found: TrainPlan) -> Table:
    title = "\nthe config's setting on other numbers of GPUs"
    table = _table(title, "", "GPUs", "accumulation", "GPU GB", "node's host GB", "a step", "the run")
    for world in found.worlds:
        table.add_row(
            "*" if world.world_size == found.chosen.setting.ranks else "",
            str(world.world_size),
            str(world.accumulation),
            f"{world.device_bytes / 1e9:.1f}",
            f"{world.host_bytes / 1e9:.1f}",
            f"{world.step_s:.3g} s",
            "unknown" if world.hours is None else hours(world.hours),
        )
    return table


def _recommend(found: TrainPlan, console: Console) -> None:
    for gb in GPUS_GB:
        best = found.fits(gb)
        said = f"{gb} GB GPU: {_keys(best)} ({best.device.peak / 1e9:.1f} GB)" if best else _nothing(found, gb)
        console.print(said, highlight=False, soft_wrap=True)


def _keys(plan: SettingPlan) -> str:
    """The overrides of a setting."""
    setting = plan.setting
    keys = [f"train.zero_stage={setting.zero_stage}", f"train.activation_checkpointing={setting.recompute}"]
    return " ".join([*keys, *(["train.offload_optimizer=true"] if setting.offload else [])])


def _nothing(found: TrainPlan, gb: int) -> str:
    least = min(found.settings, key=lambda plan: plan.device.peak)
    said = f"{gb} GB GPU: no setting fits, {least.device.peak / 1e9:.1f} GB at least ({_keys(least)})"
    return f"{said}. {_way_to_fit(found, least.device, gb * 1e9)}"


def _way_to_fit(found: TrainPlan, least: DeviceMemory, memory: float) -> str:
    """Advice to make a training smaller than its smallest setting: fewer examples at once, then smaller clips.

    Activations grow with the examples, and about with the pixels: for the fixed part a tenth is left free.
    """
    weights = least.peak - (1 + FRAGMENTATION) * least.activations
    if memory < max(weights, CONTEXT_BYTES + (1 + FRAGMENTATION) * least.start):
        return "Its weights alone are too large: share them among more GPUs, train adapters (lora), or a smaller model"
    share = (memory - weights) / ((1 + FRAGMENTATION) * least.activations)
    if found.micro_batch * share >= 1:
        most = max(n for n in range(1, int(found.micro_batch * share) + 1) if found.micro_batch % n == 0)
        return f"Set train.micro_batch={most}"
    frames, *sides = map(int, found.largest.split("x"))
    short, long = (int(side * math.sqrt(0.9 * found.micro_batch * share) / 32) * 32 for side in sorted(sides))
    one = "" if found.micro_batch == 1 else " and set train.micro_batch=1"
    if not short:
        return f"No clip of {frames} frames is small enough: take a GPU with more memory"
    return f"Build a cache with smaller clips: clip.short_side={short} clip.long_side={long}{one}"


def _show_cache(found: CachePlan, console: Console) -> None:
    what = "all views" if found.counted else "one clip"
    rows = [
        ("counted", f"{what}: {found.clips:,} clips, {found.masks:,} masks, {found.examples:,} examples"),
        ("clips", _shares(found.shapes)),
        ("sentences", f"{found.sentences:,} distinct in one view, encoded once; other views may add flipped ones"),
        ("disk", f"{size(found.total_bytes)}: latents {size(found.latent_bytes)}, text {size(found.text_bytes)}"),
        ("work", f"VAE {work(found.video_flop)}, UMT5 {work(found.text_flop)}"),
        ("time", f"{hours(found.hours)} on {found.workers} worker{'s' * (found.workers != 1)}; {_speed(found)}"),
        ("GPU", f"{size(found.device_bytes)}: {_fits(found.device_bytes)}"),
        ("host", f"{size(found.host_bytes)} a worker while the text encoder is loaded"),
    ]
    _facts(rows, console)


def _show_evaluation(found: EvaluatePlan, console: Console) -> None:
    rows = [
        ("counted", f"{found.videos:,} videos, {found.sentences:,} sentences; the longest {found.longest}"),
        ("work", f"{work(found.flop)}, what runs in fp32 counted twice"),
        ("time", f"{hours(found.hours)} on {found.workers} processes; {_speed(found)}"),
        ("GPU", f"{size(found.device_bytes)}, weights {size(found.weights_bytes)}: {_fits(found.device_bytes)}"),
        *_decoder(found.decoder_share),
    ]
    _facts(rows, console)


def _decoder(share: float | None) -> list[tuple[str, str]]:
    return [] if share is None else [("decoder", f"light: {100 * share:.2g} % of the VAE decoder's FLOPs")]


def _fits(needed: float) -> str:
    fit = [str(gb) for gb in GPUS_GB if needed <= gb * 1e9]
    return f"fits on {', '.join(fit)} GB" if fit else f"fits on none of {', '.join(map(str, GPUS_GB))} GB"


def _shares(shapes: dict[str, float]) -> str:
    most = sorted(shapes.items(), key=lambda item: -item[1])
    named = ", ".join(f"{shape} ({share:.0%})" for shape, share in most[:4])
    return f"{named} and {len(most) - 4} more shapes" if len(most) > 4 else named


def _speed(found: Any) -> str:
    speed = found.speed
    return f"{speed.gpu}, {speed.tflops:g} TFLOP/s x MFU {speed.mfu:g}, which is stated, not measured"
