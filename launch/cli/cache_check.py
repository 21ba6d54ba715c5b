"""What `flowmask cache verify` and `cache repair` say, and where the latter finds the config of the build."""

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from flowmask.data_pipeline.check.verify_report import VerifyReport
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.models.errors import ConfigError

CONFIG = "config.yaml"


def show_report(report: VerifyReport, folder: Path, console: Console) -> None:
    """One line for each wrong file, one for the decoded masks, one for the whole."""
    for problem in report.problems:
        console.print(f"[red]wrong[/]  {problem.file}: {problem.reason}", highlight=False, soft_wrap=True)
    if report.not_decoded:
        console.print(f"masks not decoded: {report.not_decoded}", highlight=False, soft_wrap=True)
    if report.masks:
        overlaps, errors = ([getattr(m, name) for m in report.masks] for name in ("iou", "error"))
        poor = f"; {len(report.poor_masks)} below what training can use" if report.poor_masks else ""
        console.print(
            f"{len(report.masks)} masks decoded: IoU with the truth mean {sum(overlaps) / len(overlaps):.3f}, "
            f"lowest {min(overlaps):.3f}{poor}; largest latent error {max(errors):.4f}",
            highlight=False,
            soft_wrap=True,
        )
    found = f"{report.shards} shards, {report.records} clips, {report.examples} examples"
    verdict = "all right" if report.ok else f"{len(report.problems)} wrong: flowmask cache repair {folder}"
    console.print(f"{folder}: {found}: {verdict}", highlight=False, soft_wrap=True)


def show_comparison(folder: Path, against: Path, *, as_json: bool, console: Console) -> None:
    """Compare two caches; exit code 1 if they are not equal within the tolerance."""
    from flowmask.data_pipeline.check.compare import compare

    result = compare(folder, against)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        for problem in result.problems:
            console.print(f"[red]differs[/]  {problem}", highlight=False, soft_wrap=True)
        errors = ", ".join(f"{kind} {error:.4f}" for kind, error in result.largest_error.items())
        console.print(
            f"{folder} and {against}: {result.shards} shards, {result.identical} of them identical; largest "
            f"relative error: {errors} (at most {result.tolerance:g} is equal)",
            highlight=False,
            soft_wrap=True,
        )
    if result.problems:
        raise typer.Exit(1)


def repair_cache(
    folder: Path,
    overrides: Sequence[str],
    *,
    config: Path | None,
    rebuild: Sequence[int],
    decode_masks: int,
    wan: Path | None,
    console: Console,
) -> None:
    """Verify, mend what is wrong, and say what was done."""
    from flowmask.data_pipeline.check.repair import repair
    from flowmask.data_pipeline.check.verify import verify
    from flowmask.launch.progress import bar

    with bar() as on_progress:
        report = repair(
            folder,
            found=lambda: verify(folder, decode_masks=decode_masks, wan=wan, on_progress=on_progress),
            config=lambda: build_config(folder, config, overrides),
            rebuild=rebuild,
            on_progress=on_progress,
        )
    for file, how in report.mended:
        console.print(f"mended  {file}: {how}", highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note    {note}", highlight=False, soft_wrap=True)
    done = f"{len(report.mended)} files mended" if report.mended else "nothing to repair, nothing written"
    console.print(f"{folder}: {done}", highlight=False, soft_wrap=True)


def build_config(folder: Path, config: Path | None, overrides: Sequence[str]) -> CacheBuildConfig:
    """The config of the build: the one given, or the one that the build left in the cache."""
    from flowmask.launch.config import load_job
    from flowmask.launch.jobs import CacheJob

    path = config or folder / CONFIG
    if config is None and not path.is_file():
        raise ConfigError(
            f"{path} is missing, so what {folder} was made of is not known: give the build's config with --config"
        )
    return load_job(path, CacheJob, [*overrides, f"out={folder}"])
