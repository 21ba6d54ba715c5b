"""The commands to run before a job: `flowmask plan`, `flowmask tune` and `flowmask doctor`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.words import (
    AsJson,
    ConfigFile,
    Overrides,
    exit_with,
    load_wan_libraries,
    say_json,
    say_loading,
)
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.next_steps import NEXT, say_next


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    gpu: Annotated[str | None, typer.Option(help="GPU model; default: H100")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Dense bf16 peak of the GPU in TFLOP/s, in place of --gpu")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Model FLOPs utilisation: useful share of the peak, 0 to 1")] = 0.4,
    clip: Annotated[
        str | None, typer.Option(help="Clip as FRAMESxHEIGHTxWIDTH, if there is no cache or dataset yet")
    ] = None,
    node_mtbf_h: Annotated[float, typer.Option(help="Mean hours between two failures of a node")] = 3692.0,
    restart_min: Annotated[float, typer.Option(help="Minutes from a failure to the next step, with the queue")] = 10.0,
) -> None:
    """Estimate memory for each ZeRO stage, hours and disk space of a job. Needs no GPU and no weights."""
    load_wan_libraries()
    from flowmask.launch.plan import plan as planning
    from flowmask.launch.plan.show import show

    speed = planning.speed_of(gpu=gpu, tflops=tflops, mfu=mfu)
    cluster = planning.cluster_of(node_mtbf_h=node_mtbf_h, restart_min=restart_min)
    found = planning.plan(config, overrides or [], speed=speed, clip=planning.clip_of(clip), cluster=cluster)
    if as_json:
        say_json(planning.to_json(found))
    else:
        show(found, console)
        say_next(NEXT["plan"], config, *overrides or [])


def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="Time limit in minutes")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="YAML file to create: the config with the fastest settings")] = None,
) -> None:
    """Time settings of a training or cache build on this machine, and show the fastest.

    No setting that it tries changes the results.
    """
    began = time.monotonic()  # the imports below take seconds
    say_loading()
    from flowmask.launch.tune import tune as tuning
    from flowmask.launch.tune.search import as_words
    from flowmask.launch.tune.show import show

    found = tuning.tune(config, overrides or [], minutes=minutes, out=out, began=began)
    show(found, console)
    if found.time_is_over:
        console.print(f"The time limit came before all settings were tried. To try more: --minutes {2 * minutes:g}")
    if out is not None:
        console.print(f"wrote {out}")
    changes = "" if out is not None else as_words(found.best.changes)
    say_next(f"{NEXT['tune']} {changes}".strip(), out or config)


def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML of a job; its paths and settings are checked too")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: libraries, GPUs, filesystem, weights, MLflow, SLURM. Each fault comes with its fix."""
    from flowmask.launch.check import doctor as examination
    from flowmask.launch.check.questions import subject_of

    err.print("checking this machine")  # some checks take seconds
    findings = examination.examine(subject_of(config, overrides or []))
    report = examination.as_json(findings)
    if as_json:
        say_json(report)
    else:
        examination.show(findings, console)
    exit_with(not report["ok"])
    if config is not None:
        say_next(NEXT["doctor"], config, *overrides or [])
