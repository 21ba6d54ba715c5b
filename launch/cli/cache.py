"""`flowmask cache ...`: parses, prints and exits. The work itself is done in other files."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.words import (
    AsJson,
    ConfigFile,
    Overrides,
    Wait,
    exit_with,
    load_wan_libraries,
    run_job,
    say_json,
    say_loading,
)
from flowmask.launch.console import out as console
from flowmask.launch.next_steps import NEXT, say_next

cache_app = typer.Typer(no_args_is_help=True, help="Encode a dataset into latent shards, and check them.")

Cache = Annotated[Path, typer.Argument(help="A cache folder: the `out` of `cache build`")]
DecodeMasks = Annotated[int, typer.Option(min=0, help="Number of masks to decode and compare; with 0 no VAE is needed")]
CacheWan = Annotated[Path | None, typer.Option(help="Wan2.1 folder; default: the one of the build")]


@cache_app.command("build")
def cache_build(config: ConfigFile, overrides: Overrides = None, wait: Wait = True) -> None:
    """Encode clips, masks and sentences once into OUT/shards. The same command continues a stopped build."""
    run_job("cache", config, overrides, wait=wait)


@cache_app.command("verify")
def cache_verify(
    folder: Annotated[str, typer.Argument(help="A cache folder: the `out` of `cache build`, or its s3:// URL")],
    as_json: AsJson = False,
    decode_masks: DecodeMasks = 8,
    seed: Annotated[int, typer.Option(help="Seed of the choice of masks")] = 0,
    wan: CacheWan = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Compare with this cache of the same fingerprint, within a tolerance, and check nothing else"
        ),
    ] = None,
) -> None:
    """Read every byte of a cache and name each file that differs from the one that was written."""
    say_loading()
    from flowmask.data_pipeline.check.verify import verify
    from flowmask.data_pipeline.check.verify_stored import verify_stored
    from flowmask.data_pipeline.config import folder_or_url
    from flowmask.launch.cli.cache_check import show_comparison, show_report
    from flowmask.launch.progress import bar

    place = folder_or_url(folder)
    if against is not None:
        show_comparison(Path(folder), against, as_json=as_json)
        return
    with bar(show=not as_json) as on_progress:
        if isinstance(place, str):
            report = verify_stored(place, on_progress=on_progress)
        else:
            report = verify(place, decode_masks=decode_masks, wan=wan, seed=seed, on_progress=on_progress)
    if as_json:
        say_json(report.to_json())
    else:
        show_report(report, place)
    exit_with(not report.ok)
    say_next(NEXT["cache verify"], place)


@cache_app.command("repair")
def cache_repair(
    folder: Cache,
    overrides: Overrides = None,
    unit: Annotated[
        list[int] | None, typer.Option(help="Encode this unit again without a check; may be repeated", min=0)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Config of the build; default: FOLDER/config.yaml")] = None,
    decode_masks: DecodeMasks = 8,
    wan: CacheWan = None,
) -> None:
    """Rebuild only the damaged files: only their units are encoded again."""
    load_wan_libraries()
    from flowmask.data_pipeline.check.repair import repair
    from flowmask.data_pipeline.check.verify import verify
    from flowmask.launch.cli.cache_check import build_config, show_repair
    from flowmask.launch.progress import bar

    with bar() as on_progress:
        report = repair(
            folder,
            found=lambda: verify(folder, decode_masks=decode_masks, wan=wan, on_progress=on_progress),
            config=lambda: build_config(folder, config, overrides or []),
            rebuild=unit or [],
            on_progress=on_progress,
        )
    show_repair(report, folder)
    say_next(NEXT["cache repair"], folder)


@cache_app.command("status")
def cache_status(
    folder: Annotated[Path, typer.Argument(help="A cache folder, finished or being built")], as_json: AsJson = False
) -> None:
    """Show progress, speed and workers of a build. Reads only its folder, so it works on any node."""
    from dataclasses import asdict

    from flowmask.data_pipeline.build.status import status
    from flowmask.launch.cli.cache_status import show_status

    found = status(folder)
    if as_json:
        say_json(asdict(found))
    else:
        show_status(found, console)
        if found.phase == "complete":
            say_next(NEXT["cache status"], folder)


@cache_app.command("inspect")
def cache_inspect(
    folder: Cache,
    out: Annotated[Path, typer.Option(help="The HTML file to write")],
    examples: Annotated[
        int, typer.Option(min=0, help="Number of random examples to decode; with 0 no VAE is needed")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the choice of examples")] = 0,
    wan: CacheWan = None,
) -> None:
    """Write one HTML page about a cache: its contents, and random examples decoded from the latents."""
    load_wan_libraries()
    from flowmask.data_pipeline.show.inspect_page import inspect
    from flowmask.launch.progress import bar

    with bar() as on_progress:
        inspect(folder, out=out, examples=examples, seed=seed, wan=wan, on_progress=on_progress)
    console.print(f"wrote {out}")
