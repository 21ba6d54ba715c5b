"""Arguments and helpers that the commands of `flowmask` share, and the start of a job from the command line."""

import difflib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowmask.launch.console import err, out
from flowmask.models.errors import UserError
from flowmask.models.process import MISTAKE_EXIT_CODE

if TYPE_CHECKING:
    from flowmask.models.config import AskedConventions

_NotUnderstood: Any = typer.BadParameter.__bases__[0]  # UsageError, which has no public name
ConfigFile = Annotated[Path, typer.Argument(help="YAML file, or the name of one that `flowmask configs` lists")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="KEY=VALUE, any number of them, for example train.lr=1e-4; YAML files to lay over CONFIG"),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait/--no-wait", help="On SLURM: show the progress until the job is done, or return once it is queued"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead")]
Averaged = Annotated[bool, typer.Option("--ema/--no-ema", help="Use the averaged (EMA) weights, or the last ones")]
AllowTruncated = Annotated[
    bool, typer.Option("--allow-truncated", help="Use the readable frames of a video file that is cut short")
]
PresenceOf = Annotated[
    str | None,
    typer.Option(
        help="OUT of evaluate --calibrate: masks are empty below its threshold; none: no threshold; default: the export"
    ),
]
AttentionOf = Annotated[
    Literal["native", "cudnn", "flash", "flash3", "sage"],
    typer.Option(help="Attention kernel of the DiT; all but native need a GPU and bf16"),
]
_TOLD = "for weights that do not state it"
PixelNormOf = Annotated[
    Literal["half", "imagenet"] | None, typer.Option(help=f"Normalisation of frames, {_TOLD}; default: half")
]
TextTokensOf = Annotated[
    int | None, typer.Option(help=f"Padded text length in tokens, {_TOLD}; default: 256", min=1, max=512)
]
MaskLatentNormOf = Annotated[
    Literal["none", "video"] | None, typer.Option(help=f"Normalisation of mask latents, {_TOLD}; default: none")
]
LowercaseOf = Annotated[
    bool | None, typer.Option("--lowercase/--no-lowercase", help=f"Lower-case the sentences, {_TOLD}; default: yes")
]
MaskDecoderOf = Annotated[str | None, typer.Option(help="Mask decoder; default: the one in the config of the run")]
WanOf = Annotated[Path | None, typer.Option(help="Wan2.1 folder; default: the one of the run")]
WindowFrames = Annotated[
    int | None, typer.Option(help="Frames of a window, 4k+1; default: the whole video up to 121 frames, else 81")
]
WindowOverlap = Annotated[int, typer.Option(help="Frames that two windows share, a multiple of 4")]
PrecisionOf = Annotated[Literal["bf16", "fp32"], typer.Option(help="Precision of the DiT")]
EncoderPrecisionOf = Annotated[
    Literal["bf16", "fp32"] | None,
    typer.Option(help="Precision of the encoders; default: that of the training's cache"),
]
Runs = Annotated[
    list[Path] | None, typer.Argument(help="Run folders, or folders that contain them; default: the current folder")
]
Run = Annotated[Path, typer.Argument(help="A run folder: the `out` of a job")]


def conventions_of(
    pixel_norm: Literal["half", "imagenet"] | None,
    text_tokens: int | None,
    mask_latent_norm: Literal["none", "video"] | None,
    lowercase: bool | None,
) -> "AskedConventions":
    """The four conventions of the options."""
    from flowmask.models.config import AskedConventions

    return AskedConventions(
        pixel_norm=pixel_norm, text_tokens=text_tokens, mask_latent_norm=mask_latent_norm, lowercase=lowercase
    )


_ONLY_PRINT = ("configs", "status", "logs", "plan", "tune", "doctor", "compare", "cache status", "cache verify")


_TYPES_WIDTH = 12


def keep_names_whole(arguments: Sequence[str]) -> None:
    """Have --help wrap the other columns of a narrow terminal, never cut the name of an option."""
    if not {"-h", "--help"}.intersection(arguments):
        return
    from rich.table import Table
    from rich.text import Text
    from typer import rich_utils

    class Options(Table):
        def add_row(self, *cells: Any, **styles: Any) -> None:
            super().add_row(*cells, **styles)
            for column, cell in zip(self.columns, cells, strict=False):
                if isinstance(cell, Text) and cell.plain.startswith("--"):
                    column.no_wrap = True
            if len(self.columns) > 3:  # options: the last two are their types and their help
                self.columns[-2].max_width = _TYPES_WIDTH

    rich_utils.Table = Options  # type: ignore[misc]


def only_prints(words: Sequence[str]) -> bool:
    """Whether a command line only prints an answer to stdout. Then a failed write to stdout is an error."""
    asks = not words or " ".join(words[:2]).startswith(_ONLY_PRINT)
    return asks or not {"--help", "-h", "--version", "--dry-run", "--try-settings"}.isdisjoint(words)


def say_version(asked: bool) -> None:
    """Print the versions of FlowMask and of the libraries that its results depend on, and exit."""
    if not asked:
        return
    from importlib.metadata import version

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "diffusers", "transformers"))
    said = f"flowmask {version('flowmask')} (Python {platform.python_version()}, {libraries})"
    out.print(said, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit


def run_job(kind: str, config: Path, overrides: list[str] | None, *, wait: bool) -> None:
    """Run or submit the job of a config, and exit with the exit code of the job."""
    from flowmask.launch.dispatch import start

    exit_with(start(kind, config, overrides or [], wait=wait))


def say_loading() -> None:
    """Print a line to stderr before imports that take seconds (torch, diffusers); stdout holds only the answer."""
    err.print("loading libraries")


def load_wan_libraries(*, say: bool = True) -> None:
    """Import what Wan's models need, after a line to stderr; of diffusers only what FlowMask uses.

    say: False for a command that shows its own progress
    """
    from flowmask.launch.jobs import import_diffusers

    if say:
        say_loading()
    import_diffusers()


def answer(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command line; returns its exit code. UserError, of one line, for words that it does not understand."""
    try:
        return int(app(standalone_mode=False) or 0)
    except _NotUnderstood as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help of a group of commands
            error.show()
            return MISTAKE_EXIT_CODE
        raise UserError(_misunderstanding(error, arguments)) from None


def _misunderstanding(error: Any, arguments: Sequence[str]) -> str:
    """One line: the option and its value, what is wrong, and where the right words are."""
    told = " ".join(error.format_message().split()).removesuffix(".")
    context = error.ctx
    parameter: Any = getattr(error, "param", None)
    command = context.command_path if context else "flowmask"
    value = _given(parameter.opts, arguments) if parameter and type(error).__name__ == "BadParameter" else None
    if value is not None:
        told = f"{parameter.opts[0]} is {value!r}: {error.message.removeprefix('Value error, ').removesuffix('.')}"
    elif name := getattr(error, "option_name", None) if type(error).__name__ == "NoSuchOption" else None:
        options = [option for one in context.command.params for option in one.opts if option.startswith("--")]
        near = difflib.get_close_matches(name, options, n=1)
        told = f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "")
        if not near and any(one.name == "overrides" for one in context.command.params):
            told += "; settings of the config are given without dashes, as KEY=VALUE: train.lr=1e-4"
    return f"{told[0].lower()}{told[1:]}{' See' if told.endswith('?') else '; see'} `{command} --help`"


def _given(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The value that the command line gives to an option."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names and name.startswith("-"):
            return value if equals else following
    return None


def exit_with(code: int) -> None:
    """Exit with this code, unless it is 0."""
    if code:
        raise typer.Exit(code)


def say_json(facts: Any) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(facts))
