"""`flowmask export`: trained weights from one form into another."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.track import offer
from flowmask.launch.cli.words import Averaged, PresenceOf
from flowmask.launch.console import out as console
from flowmask.models.errors import UserError


def export(
    source: Annotated[str, typer.Argument(help="A run, one of its steps, or another export")],
    format: Annotated[str, typer.Option(help="diffusers, flowrvs, safetensors, or lora: adapters alone")] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export/NAME")] = None,
    averaged: Averaged = True,
    dtype: Annotated[str, typer.Option(help="float32 keeps every bit; bfloat16 is half the size")] = "float32",
    wan: Annotated[Path | None, typer.Option(help="Wan2.1 folder; default: the run's")] = None,
    presence: PresenceOf = None,
) -> None:
    """Write trained weights so that diffusers, FlowRVS's code or any reader of safetensors loads them."""
    import torch

    from flowmask.trainer.predict.export import export as export_weights

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"--dtype is {dtype!r}; known: {', '.join(dtypes)}")
    done = export_weights(source, format=format, out=out, ema=averaged, dtype=dtypes[dtype], wan=wan, presence=presence)
    console.print(f"wrote {done.path}: {done.parameters:,} parameters, sha256 {done.sha256}")
    offer(source, done.path, to="export")
