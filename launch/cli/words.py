"""What the commands of `flowmask` have in common: arguments, and how a job is started from one."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowmask.launch.console import err, out

if TYPE_CHECKING:
    from flowmask.models.config import AskedConventions

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, or the name of one that `flowmask configs` lists")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="KEY=VALUE, as many as you like, for example train.lr=1e-4; YAML files to lay over CONFIG"),
]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="On SLURM: show the progress until the job is done, or leave")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead")]
Averaged = Annotated[bool, typer.Option("--ema/--no-ema", help="The averaged weights, or the last")]
AllowTruncated = Annotated[
    bool, typer.Option("--allow-truncated", help="Use what is left of a file that has lost its end")
]
PresenceOf = Annotated[
    str | None,
    typer.Option(help="OUT of evaluate --calibrate: no mask below its threshold; none; default: what the export says"),
]
AttentionOf = Annotated[
    Literal["native", "cudnn", "flash", "flash3", "sage"],
    typer.Option(help="The DiT's kernels; others than native: on a GPU, in bf16"),
]
_TOLD = "where the weights do not say"
PixelNormOf = Annotated[Literal["half", "imagenet"] | None, typer.Option(help=f"Of frames, {_TOLD}: half")]
TextTokensOf = Annotated[int | None, typer.Option(help=f"Padded length of text, {_TOLD}: 256", min=1, max=512)]
MaskLatentNormOf = Annotated[Literal["none", "video"] | None, typer.Option(help=f"Of the mask's latent, {_TOLD}: none")]
LowercaseOf = Annotated[bool | None, typer.Option("--lowercase/--no-lowercase", help=f"Sentences, {_TOLD}: lower case")]
Runs = Annotated[list[Path] | None, typer.Argument(help="Runs, or folders with runs below them; default: this folder")]
Run = Annotated[Path, typer.Argument(help="The `out` of a job")]


def conventions_of(
    pixel_norm: Literal["half", "imagenet"] | None,
    text_tokens: int | None,
    mask_latent_norm: Literal["none", "video"] | None,
    lowercase: bool | None,
) -> "AskedConventions":
    """The four options as they are asked for."""
    from flowmask.models.config import AskedConventions

    return AskedConventions(
        pixel_norm=pixel_norm, text_tokens=text_tokens, mask_latent_norm=mask_latent_norm, lowercase=lowercase
    )


_ONLY_PRINT = ("configs", "status", "logs", "plan", "tune", "doctor", "compare", "cache status", "cache verify")


def only_prints(words: Sequence[str]) -> bool:
    """Whether a command line asks for an answer on stdout and for nothing else: then writing it may not fail."""
    asks = not words or " ".join(words[:2]).startswith(_ONLY_PRINT)
    return asks or not {"--help", "-h", "--version", "--dry-run", "--try-settings"}.isdisjoint(words)


def say_version(asked: bool) -> None:
    """Print the versions of FlowMask and of what its results depend on, and exit."""
    if not asked:
        return
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "diffusers", "transformers"))
    said = f"flowmask {version('flowmask')} (Python {platform.python_version()}, {libraries})"
    out.print(said, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit


def run_job(kind: str, config: Path, overrides: list[str] | None, *, wait: bool) -> None:
    """Run or submit the job of a config, and exit with its code."""
    from flowmask.launch.dispatch import start

    exit_with(start(kind, config, overrides or [], wait=wait))


def say_loading() -> None:
    """A first line, before imports that take seconds (torch, diffusers): on stderr, so that stdout stays an answer."""
    err.print("loading libraries")


def exit_with(code: int) -> None:
    """End the command with a code, unless that is 0."""
    if code:
        raise typer.Exit(code)


def say_json(facts: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(facts))
