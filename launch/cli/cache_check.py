"""The output of `flowmask cache verify` and `cache repair`, and the config of the build for a repair."""

from collections.abc import Sequence
from pathlib import Path

from flowmask.data_pipeline.check.repair import RepairReport
from flowmask.data_pipeline.check.verify_report import VerifyReport
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.launch.cli.words import exit_with, say_json
from flowmask.launch.console import out as console
from flowmask.models.errors import ConfigError
from flowmask.models.safe.words import printable

CONFIG = "config.yaml"


def show_report(report: VerifyReport, place: Path | str) -> None:
    """Print one line for each damaged file, one for the decoded masks and one verdict."""
    for problem in report.problems:
        console.print(printable(f"wrong  {problem.file}: {problem.reason}"))
    if report.not_decoded:
        console.print(f"masks not decoded: {report.not_decoded}")
    if report.masks:
        overlaps, errors = ([getattr(m, name) for m in report.masks] for name in ("iou", "error"))
        console.print(
            f"{len(report.masks)} masks decoded: IoU with the truth mean {sum(overlaps) / len(overlaps):.3f}, "
            f"lowest {min(overlaps):.3f}; largest latent error {max(errors):.4f}"
        )
    found = f"{report.shards} shards, {report.records} clips, {report.examples} examples"
    console.print(f"{place}: {found}. {report.verdict(place)}")


def show_comparison(folder: Path, against: Path, *, as_json: bool) -> None:
    """Compare two caches and exit with code 1 if they differ by more than the tolerance."""
    from flowmask.data_pipeline.check.compare import compare

    result = compare(folder, against)
    if as_json:
        say_json(result.to_json())
    else:
        for problem in result.problems:
            console.print(printable(f"differs  {problem}"))
        errors = ", ".join(f"{kind} {error:.4f}" for kind, error in result.largest_error.items())
        console.print(
            f"{folder} and {against}: {result.shards} shards, {result.identical} of them identical; largest "
            f"relative error: {errors} (up to {result.tolerance:g} counts as equal)"
        )
    exit_with(bool(result.problems))


def show_repair(report: RepairReport, folder: Path) -> None:
    """Print one line for each repair, and the result."""
    for file, how in report.mended:
        console.print(printable(f"repaired  {file}: {how}"))
    for note in report.notes:
        console.print(printable(f"note      {note}"))
    done = f"{len(report.mended)} files repaired" if report.mended else "nothing to repair, nothing written"
    console.print(f"{folder}: {done}")


def build_config(folder: Path, config: Path | None, overrides: Sequence[str]) -> CacheBuildConfig:
    """The config of the build: `config`, else the copy that the build wrote into the cache."""
    from flowmask.launch.jobs import CacheJob, load_kind

    path = config or folder / CONFIG
    if config is None and not path.is_file():
        raise ConfigError(
            f"{path} is missing, so the config of {folder} is unknown; give the config of the build with --config"
        )
    return load_kind(path, CacheJob, [*overrides, f"out={folder}"])
