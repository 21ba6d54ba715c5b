"""`flowmask export` and `flowmask import`: conversion of trained weights; `flowmask tiny-wan`: random ones."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.track import offer
from flowmask.launch.cli.words import (
    Averaged,
    LowercaseOf,
    MaskLatentNormOf,
    PixelNormOf,
    PresenceOf,
    TextTokensOf,
    conventions_of,
    load_wan_libraries,
)
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.next_steps import AFTER_EXPORT, NEXT, say_next
from flowmask.models.errors import UserError

import_app = typer.Typer(
    no_args_is_help=True, help="Convert other projects' weights into a folder that FlowMask reads."
)


@import_app.callback()
def _import() -> None:
    """Convert other projects' weights into a folder that FlowMask reads."""


@import_app.command("wan")
def from_wan(
    source: Annotated[Path, typer.Argument(help="Folder of Wan2.1's original files, or the file of one part")],
    out: Annotated[
        Path, typer.Argument(help="Folder to create, in the diffusers layout; then use it as model.wan or --wan")
    ],
) -> None:
    """Convert Wan2.1's original files to diffusers' names, bit for bit. Accepts ComfyUI's prefix."""
    load_wan_libraries()
    from flowmask.models.weights.import_wan import import_wan

    import_wan(source, out, say=err.print)
    console.print(f"wrote {out}")
    say_next(NEXT["import wan"], out)


@import_app.command("flowrvs")
def from_flowrvs(
    out: Annotated[Path, typer.Argument(help="Folder to create; then use it as --checkpoint, with Wan2.1")],
    dit: Annotated[Path, typer.Option(help="The DiT: a FlowRVS .pth, or a state dict")],
    decoder: Annotated[Path | None, typer.Option(help="The mask decoder; default: the VAE's own")] = None,
    averaged: Averaged = True,
    wan: Annotated[Path | None, typer.Option(help="Wan2.1 folder: also write the files that diffusers needs")] = None,
    pixel_norm: PixelNormOf = None,
    text_tokens: TextTokensOf = None,
    mask_latent_norm: MaskLatentNormOf = None,
    lowercase: LowercaseOf = None,
) -> None:
    """Convert FlowRVS's published weights to an export, which also stores the settings that their files lack."""
    load_wan_libraries()
    from flowmask.trainer.predict.import_flowrvs import import_flowrvs

    asked = conventions_of(pixel_norm, text_tokens, mask_latent_norm, lowercase)
    done = import_flowrvs(dit, decoder=decoder, out=out, conventions=asked, ema=averaged, wan=wan, say=err.print)
    console.print(f"wrote {done.path}: {done.parameters:,} parameters, sha256 {done.sha256}")
    say_next(NEXT["import flowrvs"] + " --wan WAN" * (wan is None), done.path)


def export(
    source: Annotated[str, typer.Argument(help="A run, one of its steps, or another export")],
    format: Annotated[
        str, typer.Option(help="diffusers, flowrvs, safetensors, or lora (only the adapters)")
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export/NAME")] = None,
    averaged: Averaged = True,
    dtype: Annotated[str, typer.Option(help="float32 keeps every bit; bfloat16 is half the size")] = "float32",
    wan: Annotated[Path | None, typer.Option(help="Wan2.1 folder; default: the one of the run")] = None,
    presence: PresenceOf = None,
) -> None:
    """Write trained weights in a format that diffusers, FlowRVS's code or any safetensors reader loads."""
    load_wan_libraries()
    import torch

    from flowmask.trainer.predict.export import export as export_weights

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"--dtype is {dtype!r}; known: {', '.join(dtypes)}")
    done = export_weights(source, format=format, out=out, ema=averaged, dtype=dtypes[dtype], wan=wan, presence=presence)
    console.print(f"wrote {done.path}: {done.parameters:,} parameters, sha256 {done.sha256}")
    offer(source, done.path, to=f"weights/{done.path.name}", weights=True)
    alone = done.part == "dit" and done.path.is_file()  # without Wan's other parts and the mask decoder
    say_next(AFTER_EXPORT[done.part] + " --wan WAN --mask-decoder DECODER" * alone, done.path)


def tiny_wan(
    folder: Annotated[Path, typer.Argument(help="Folder to create")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights")] = 0,
    random_vae: Annotated[bool, typer.Option("--random-vae", help="Make the VAE random too")] = False,
) -> None:
    """Write a tiny checkpoint in the layout of Wan2.1, to test offline. All weights but the VAE's are random."""
    load_wan_libraries()
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_tiny_wan(folder, seed=seed, random_vae=random_vae)
    console.print(f"wrote {folder}")
    say_next(NEXT["tiny-wan"], folder)
