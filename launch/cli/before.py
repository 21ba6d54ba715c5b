"""What a person asks before a job starts: `flowmask plan` and `flowmask doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.words import AsJson, ConfigFile, Overrides, exit_with, say_json, say_loading
from flowmask.launch.console import err
from flowmask.launch.console import out as console


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    gpu: Annotated[str | None, typer.Option(help="GPU by name; default: H100")] = None,
    tflops: Annotated[float | None, typer.Option(help="Its dense bf16 peak instead")] = None,
    mfu: Annotated[float, typer.Option(help="The part of the peak that is useful work, 0 to 1")] = 0.4,
    clip: Annotated[
        str | None, typer.Option(help="FRAMESxHEIGHTxWIDTH, where there is no cache or dataset yet")
    ] = None,
    node_mtbf_h: Annotated[float, typer.Option(help="Mean hours between two failures of a node")] = 3692.0,
    restart_min: Annotated[float, typer.Option(help="Minutes from a failure to the next step, queue included")] = 10.0,
) -> None:
    """What a job holds, takes and writes: memory for each ZeRO stage, hours, bytes. Needs no GPU and no weights."""
    say_loading()
    from flowmask.launch.plan import plan as planning
    from flowmask.launch.plan.show import show

    speed = planning.speed_of(gpu=gpu, tflops=tflops, mfu=mfu)
    cluster = planning.cluster_of(node_mtbf_h=node_mtbf_h, restart_min=restart_min)
    found = planning.plan(config, overrides or [], speed=speed, clip=planning.clip_of(clip), cluster=cluster)
    if as_json:
        say_json(planning.to_json(found))
    else:
        show(found, console)


def doctor(
    config: Annotated[Path | None, typer.Argument(help="A job's YAML: what it names is checked too")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Is this machine fit for the job? Libraries, GPUs, filesystem, weights, MLflow, SLURM; a fix for each fault."""
    from flowmask.launch.check import doctor as examination
    from flowmask.launch.check.questions import subject_of

    err.print("looking at this machine")  # some questions take seconds
    findings = examination.examine(subject_of(config, overrides or []))
    report = examination.as_json(findings)
    if as_json:
        say_json(report)
    else:
        examination.show(findings, console)
    exit_with(not report["ok"])
