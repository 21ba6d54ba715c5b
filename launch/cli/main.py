"""The command `flowmask`. Parses, prints and exits; every job itself belongs to another file.

A person's mistake is one line on stderr and exit code 2; a stack trace is a bug of ours.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flowmask.launch.cli import words
from flowmask.launch.cli.before import doctor, plan, tune
from flowmask.launch.cli.cache import cache_app
from flowmask.launch.cli.compare import compare
from flowmask.launch.cli.predict import predict
from flowmask.launch.cli.reference import config
from flowmask.launch.cli.serve import serve
from flowmask.launch.cli.track import track
from flowmask.launch.cli.try_settings import show_settings
from flowmask.launch.cli.weights import export, import_app
from flowmask.launch.cli.words import AsJson, ConfigFile, Overrides, Run, Wait, exit_with, run_job, say_loading
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.local.worker import explain_os_error, quieten_libraries, run_process
from flowmask.models.errors import UserError
from flowmask.models.process import MISTAKE_EXIT_CODE, forget_group
from flowmask.models.safe.words import printable

# The commands in the order of the work, as --help shows them.
PANELS = {
    "Start here": ("demo", "toy", "doctor", "configs", "config", "tiny-wan"),
    "Data and weights": ("import", "cache", "plan"),
    "Train": ("tune", "train", "submit", "curriculum", "reproduce"),
    "Score and use": ("evaluate", "compare", "predict", "export", "serve"),
    "Runs": ("status", "logs", "stop", "track"),
}


class InOrder(TyperGroup):
    """Lists the commands in the order of PANELS, each in its panel."""

    def list_commands(self, ctx: Any) -> list[str]:
        for panel, names in PANELS.items():
            for name in names:
                self.commands[name].rich_help_panel = panel  # type: ignore[attr-defined]
        return [name for names in PANELS.values() for name in names]


app = typer.Typer(
    cls=InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, evaluate and run referring video segmentation by flow matching on Wan2.1.\n\n"
    "Start with: flowmask demo --out out/demo",
)
app.add_typer(cache_app, name="cache")


@app.callback()
def flowmask(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=words.say_version, help="Show the versions and exit")
    ] = False,
) -> None:
    """Every command's own --help says more."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything is written")] = Path("out/demo"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Every stage, no claim on the score; 90 s")] = False,
    full: Annotated[bool, typer.Option("--full", help="Trains longer; up to an hour")] = False,
) -> None:
    """Dataset, cache, mask decoder, DiT, J&F and prediction on a synthetic world, on this machine."""
    if smoke and full:
        raise UserError("--smoke and --full exclude each other; give one or none")
    from flowmask.launch.demo.demo import Profile, run_demo

    run_demo(out, Profile.SMOKE if smoke else Profile.FULL if full else Profile.DEFAULT, console=console)


@app.command()
def toy(
    folder: Annotated[Path, typer.Argument(help="A new folder, or a toy's: what is missing is written")],
    seed: Annotated[int, typer.Option(min=0, help="Of weights and scenes")] = 0,
) -> None:
    """Write a tiny Wan, small datasets, and the try.yaml under which every config runs in minutes on two cores."""
    say_loading()
    from flowmask.launch.toy.toy import commands, write_toy

    sentence = write_toy(folder, seed=seed, say=err.print)
    console.print(f"wrote {folder}; next:")
    for command in commands(folder, sentence):
        typer.echo(f"  {command}")


@app.command()
def configs(copy: Annotated[Path | None, typer.Option(help="Copy all of them into this folder")] = None) -> None:
    """The configs that come with FlowMask: `flowmask train train_mevis` takes one by its name."""
    from flowmask.launch.configs import bundled, copy_configs

    if copy is not None:
        console.print(f"copied {len(copy_configs(copy))} files into {copy}")
        return
    for name, first_line in bundled().items():
        console.print(f"{name!s:26} {first_line}")


app.command()(config)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the progress until the job is done")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script and the plan; needs no SLURM")
    ] = False,
) -> None:
    """Check a job of any kind, freeze its code and send it where launch.cluster says: slurm, local or debug."""
    from flowmask.launch.dispatch import submit as submit_job

    exit_with(submit_job(config, overrides or [], wait=wait, dry_run=dry_run))


@app.command()
def curriculum(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what would run or be skipped, and why")
    ] = False,
) -> None:
    """Run stages that build on each other, here or on SLURM; what is done is skipped, the same command goes on."""
    from flowmask.launch.curriculum.curriculum import run_curriculum
    from flowmask.launch.curriculum.stages import load_curriculum

    exit_with(run_curriculum(load_curriculum(config, overrides or []), wait=wait, dry_run=dry_run))


@app.command()
def reproduce(
    config: ConfigFile,
    overrides: Overrides = None,
    profile: Annotated[
        str | None, typer.Option(help="Other sizes, as the file has them; demo: a synthetic world on two cores")
    ] = None,
    wait: Wait = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained and scored")] = False,
) -> None:
    """Fill a published table: every row over seeds, ours beside theirs on one page. The same command goes on."""
    from flowmask.launch.reproduce.reproduce import reproduce as run_study

    exit_with(run_study(config, overrides or [], profile=profile, wait=wait, dry_run=dry_run))


@app.command()
def status(runs: words.Runs = None, as_json: AsJson = False) -> None:
    """How runs are getting on: state and why, step, loss, speed, time left, restarts, where the logs are."""
    from flowmask.launch.watch.control import show_status

    show_status(runs or [Path()], as_json=as_json)


@app.command()
def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option(help="What this rank's node printed, on SLURM")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Lines from the end")] = 100,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run is over")] = False,
) -> None:
    """The log of a run; of one that failed on SLURM, what it printed."""
    from flowmask.launch.watch.control import show_logs

    show_logs(run, rank=rank, lines=lines, follow=follow)


@app.command()
def stop(
    run: Run,
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds to wait for it to end")] = 1800.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has ended")] = True,
) -> None:
    """Let a run save at its next step and end for good; the same command that started it goes on from there."""
    from flowmask.launch.watch.control import stop as stop_run

    stop_run(run, timeout_s=timeout_s, wait=wait)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, wait: Wait = True) -> None:
    """Train a DiT or a mask decoder on a cache. The same command again resumes the run in OUT, exactly."""
    run_job("train", config, overrides, wait=wait)


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First choose on calibrate.data below which presence no mask is kept")
    ] = False,
    try_settings: Annotated[
        bool, typer.Option("--try-settings", help="Only show J&F of each convention that the weights do not tell")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --try-settings finds as JSON")] = False,
) -> None:
    """Predict every expression of a split and score it: J, F, J&F, masks and a report in OUT."""
    if as_json and not try_settings:
        raise UserError("--json goes with --try-settings; the scores of an evaluation are in OUT/scores.json")
    if try_settings:
        show_settings(config, overrides or [], as_json=as_json)
        return
    run_job("evaluate", config, [*(overrides or []), *(["calibrate.enabled=true"] if calibrate else [])], wait=wait)


app.command()(compare)


app.command()(predict)
app.command()(serve)
app.command()(export)
app.add_typer(import_app, name="import")


app.command()(plan)
app.command()(tune)
app.command()(doctor)
app.command()(track)


@app.command("tiny-wan")
def tiny_wan(
    folder: Annotated[Path, typer.Argument(help="A new folder")],
    seed: Annotated[int, typer.Option(help="Of the random weights")] = 0,
    random_vae: Annotated[bool, typer.Option("--random-vae", help="Also a random VAE")] = False,
) -> None:
    """Write a tiny checkpoint in the layout of Wan2.1, to try everything offline: random, but for its VAE."""
    say_loading()
    from flowmask.models.weights.tiny_wan import write_tiny_wan

    write_tiny_wan(folder, seed=seed, random_vae=random_vae)
    console.print(f"wrote {folder}")


def command() -> None:
    """Entry point. Nothing that is started from here looks for modules in the working folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
    forget_group()
    run_process(main, answers=words.only_prints(sys.argv[1:]))


def main() -> None:
    """Run the command; one line and exit code 2 for what a person can mend."""
    quieten_libraries()
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        message = explain_os_error(error)
        if message is None:
            raise
        _fail(message)


def _fail(message: str) -> None:
    err.print(f"flowmask: {printable(message)}", style="red")
    sys.exit(MISTAKE_EXIT_CODE)
