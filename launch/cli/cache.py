"""`flowmask cache ...`: parses, prints and exits; every command's work belongs to another file."""

from pathlib import Path
from typing import Annotated

import typer

from flowmask.launch.cli.words import AsJson, ConfigFile, Overrides, Wait, exit_with, run_job, say_json, say_loading
from flowmask.launch.console import out as console

cache_app = typer.Typer(no_args_is_help=True, help="Pre-encode a dataset into latent shards, and check them.")

Cache = Annotated[Path, typer.Argument(help="A cache: the `out` of `cache build`")]
DecodeMasks = Annotated[int, typer.Option(min=0, help="Masks to decode and compare; 0 needs no VAE")]
CacheWan = Annotated[Path | None, typer.Option(help="Wan2.1 folder; default: the build's")]


@cache_app.command("build")
def cache_build(config: ConfigFile, overrides: Overrides = None, wait: Wait = True) -> None:
    """Encode clips, masks and sentences once into OUT/shards. A killed build goes on where it stopped."""
    run_job("cache", config, overrides, wait=wait)


@cache_app.command("verify")
def cache_verify(
    folder: Annotated[str, typer.Argument(help="A cache: the `out` of `cache build`, or its s3:// URL")],
    as_json: AsJson = False,
    decode_masks: DecodeMasks = 8,
    seed: Annotated[int, typer.Option(help="Of the choice of masks")] = 0,
    wan: CacheWan = None,
    against: Annotated[
        Path | None, typer.Option(help="Compare with this cache of the same fingerprint instead, within a tolerance")
    ] = None,
) -> None:
    """Read every byte of a cache again and name each file that is not as it was written."""
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


@cache_app.command("repair")
def cache_repair(
    folder: Cache,
    overrides: Overrides = None,
    unit: Annotated[
        list[int] | None, typer.Option(help="Encode this unit again without looking; may be given several times", min=0)
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Of the build; default: FOLDER/config.yaml")] = None,
    decode_masks: DecodeMasks = 8,
    wan: CacheWan = None,
) -> None:
    """Rebuild the files that are wrong, and no other: only their units are encoded again."""
    say_loading()
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


@cache_app.command("status")
def cache_status(
    folder: Annotated[Path, typer.Argument(help="A cache, finished or being built")], as_json: AsJson = False
) -> None:
    """How far a build is, how fast, who works on what: read from its folder alone, from any node."""
    from dataclasses import asdict

    from flowmask.data_pipeline.build.status import status
    from flowmask.launch.cli.cache_status import show_status

    found = status(folder)
    if as_json:
        say_json(asdict(found))
    else:
        show_status(found, console)


@cache_app.command("inspect")
def cache_inspect(
    folder: Cache,
    out: Annotated[Path, typer.Option(help="The HTML file to write")],
    examples: Annotated[int, typer.Option(min=0, help="Random examples to decode; 0 needs no VAE")] = 12,
    seed: Annotated[int, typer.Option(help="Of the choice of examples")] = 0,
    wan: CacheWan = None,
) -> None:
    """Write one HTML page of a cache: what is in it, and random examples decoded from the latents."""
    say_loading()
    from flowmask.data_pipeline.show.inspect_page import inspect
    from flowmask.launch.progress import bar

    with bar() as on_progress:
        inspect(folder, out=out, examples=examples, seed=seed, wan=wan, on_progress=on_progress)
    console.print(f"wrote {out}")
