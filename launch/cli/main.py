"""The command `flowmask`. Parses, prints and exits; every job itself belongs to another file.

A user error is one line on stderr and exit code 2. A stack trace means a bug in FlowMask.
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
from flowmask.launch.cli.track import profile, report, track
from flowmask.launch.cli.try_settings import show_settings
from flowmask.launch.cli.weights import export, import_app, tiny_wan
from flowmask.launch.cli.words import AsJson, ConfigFile, Overrides, Run, Wait, exit_with, load_wan_libraries, run_job
from flowmask.launch.console import err
from flowmask.launch.console import out as console
from flowmask.launch.local.worker import explain_disk_error, quieten_libraries, run_process
from flowmask.launch.next_steps import NEXT, NOT_DRY, say_next
from flowmask.models.errors import UserError
from flowmask.models.process import MISTAKE_EXIT_CODE, forget_group
from flowmask.models.safe.words import printable

# The commands in the order of the work, as --help shows them.
PANELS = {
    "Start here": ("demo", "toy", "doctor", "configs", "config", "tiny-wan"),
    "Data and weights": ("import", "cache", "plan"),
    "Train": ("tune", "train", "submit", "curriculum", "reproduce"),
    "Score and use": ("evaluate", "compare", "predict", "export", "serve"),
    "Runs": ("status", "logs", "stop", "profile", "report", "track"),
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
    """`flowmask COMMAND --help` describes each command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results")] = Path("out/demo"),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run every stage in about 90 s; the score does not matter")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train longer, up to an hour")] = False,
) -> None:
    """Run every stage on this machine with synthetic videos: dataset, cache, mask decoder, DiT, J&F, prediction."""
    if smoke and full:
        raise UserError("--smoke and --full can't be combined; give one of them or none")
    from flowmask.launch.demo.demo import Profile, run_demo

    run_demo(out, Profile.SMOKE if smoke else Profile.FULL if full else Profile.DEFAULT, console=console)
    say_next(NEXT["demo"], out / "runs" / "dit")


@app.command()
def toy(
    folder: Annotated[Path, typer.Argument(help="A new folder, or a toy's: what is missing is written")],
    seed: Annotated[int, typer.Option(min=0, help="Of weights and scenes")] = 0,
) -> None:
    """Write a tiny Wan, small datasets, and the try.yaml under which every config runs in minutes on two cores."""
    load_wan_libraries()
    from flowmask.launch.toy.toy import commands, write_toy

    sentence = write_toy(folder, seed=seed, say=err.print)
    console.print(f"{folder} is complete; next:")
    for command in commands(folder, sentence):
        typer.echo(f"  {command}")


@app.command()
def configs(copy: Annotated[Path | None, typer.Option(help="Copy all of them into this folder")] = None) -> None:
    """List the bundled configs. A command takes one by its name: `flowmask train train_mevis`."""
    from flowmask.launch.configs import bundled, copy_configs

    if copy is not None:
        console.print(f"copied {len(copy_configs(copy))} files into {copy}")
        return
    for name, first_line in bundled().items():
        console.print(f"{name!s:26} {first_line}")
    say_next(NEXT["configs"])


app.command()(config)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="On SLURM: wait and show the progress until the job is done")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script and the plan; needs no SLURM")
    ] = False,
) -> None:
    """Check a job of any kind, save a copy of the code, and run it on launch.cluster: slurm, local or debug."""
    from flowmask.launch.dispatch import submit as submit_job

    exit_with(submit_job(config, overrides or [], wait=wait, dry_run=dry_run))


@app.command()
def curriculum(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each stage, whether it would run or be skipped, and why")
    ] = False,
) -> None:
    """Run stages that build on each other, here or on SLURM. The same command skips finished stages and continues."""
    from flowmask.launch.curriculum.curriculum import run_curriculum
    from flowmask.launch.curriculum.stages import load_curriculum

    asked = load_curriculum(config, overrides or [])
    exit_with(run_curriculum(asked, wait=wait, dry_run=dry_run))
    say_next(*((NOT_DRY,) if dry_run else (NEXT["curriculum"], asked.out)))


@app.command()
def reproduce(
    config: ConfigFile,
    overrides: Overrides = None,
    profile: Annotated[
        str | None, typer.Option(help="Name of a profile in the config; demo: synthetic videos, on two CPU cores")
    ] = None,
    wait: Wait = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials that would be trained and scored")
    ] = False,
) -> None:
    """Reproduce a published table: train every row over seeds, and compare on one page. The same command continues."""
    from flowmask.launch.reproduce.reproduce import reproduce as run_study

    exit_with(run_study(config, overrides or [], profile=profile, wait=wait, dry_run=dry_run))
    if dry_run:
        say_next(NOT_DRY)


@app.command()
def status(runs: words.Runs = None, as_json: AsJson = False) -> None:
    """Show the state of runs: step, loss, speed, time left, restarts, reason of an end, and the logs."""
    from flowmask.launch.watch.control import show_status

    show_status(runs or [Path()], as_json=as_json)


@app.command()
def logs(
    run: Run,
    rank: Annotated[int | None, typer.Option(help="On SLURM: the output of this rank's node")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of lines from the end")] = 100,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing until the run has ended")] = False,
) -> None:
    """Print the log of a run; for a run that failed on SLURM, the output of its tasks."""
    from flowmask.launch.watch.control import show_logs

    show_logs(run, rank=rank, lines=lines, follow=follow)


@app.command()
def stop(
    run: Run,
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds to wait until it has ended")] = 1800.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it has ended")] = True,
) -> None:
    """Ask a run to save at its next step and end. The command that started it continues from there."""
    from flowmask.launch.watch.control import stop as stop_run

    stop_run(run, timeout_s=timeout_s, wait=wait)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, wait: Wait = True) -> None:
    """Train a DiT or a mask decoder on a cache. The same command resumes the run in OUT exactly."""
    run_job("train", config, overrides, wait=wait)


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    wait: Wait = True,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="First choose the presence threshold on calibrate.data; below it, masks are empty"
        ),
    ] = False,
    try_settings: Annotated[
        bool, typer.Option("--try-settings", help="Only show J&F for each convention that the weights do not state")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result of --try-settings as JSON")] = False,
) -> None:
    """Predict every expression of a split and score it: J, F, J&F, masks and a report in OUT."""
    if as_json and not try_settings:
        raise UserError("--json needs --try-settings; the scores of an evaluation are in OUT/scores.json")
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
app.command()(profile)
app.command()(report)
app.command()(track)
app.command("tiny-wan")(tiny_wan)


def command() -> None:
    """Entry point. Neither this process nor its children import modules from the working folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
    forget_group()
    run_process(main, answers=words.only_prints(sys.argv[1:]))


def main() -> None:
    """Run the command. An error that the user can fix is one line and exit code 2."""
    quieten_libraries()
    words.keep_names_whole(sys.argv[1:])
    try:
        code = words.answer(app, sys.argv[1:])
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        message = explain_disk_error(error)
        if message is None:
            raise
        _fail(message)
    sys.exit(code)


def _fail(message: str) -> None:
    err.print(f"flowmask: {printable(message)}", style="red")
    sys.exit(MISTAKE_EXIT_CODE)
