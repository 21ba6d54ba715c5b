"""Growth with the number of clips, shards and build workers, counted and measured on one machine.

    python benchmarks/scale.py clips --sizes 100000 1000000
    python benchmarks/scale.py workers --workers 1 8 64 200
    python benchmarks/scale.py status --sizes 10000 100000

Each prints a table. CPU seconds are valid on a busy machine too; memory is the peak of a new process.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measuring import fresh, measured, part, run, table

CLIPS_PER_SHARD, SENTENCES = 64, 2


@part("clips")
def clips(arguments: Namespace) -> None:
    """CPU seconds and memory of the real planner and finaliser, by the number of clips."""

    def rows() -> Iterator[Sequence[object]]:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                plan = fresh("plan_clips", folder, size)
                fresh("write_sidecars", folder)
                done = fresh("finalise_clips", folder)
            yield (
                size,
                *(f"{one[key]:.{digits}f}" for one in (plan, done) for key, digits in (("cpu_s", 1), ("peak_mib", 0))),
            )

    table(("clips", "plan: CPU s", "MiB", "finalise: CPU s", "MiB"), rows())


def plan_clips(folder: str, size: str) -> dict[str, Any]:
    import stub_build

    config = stub_build.config_of(Path(folder), clips_per_shard=CLIPS_PER_SHARD)
    return measured(lambda: stub_build.write_plan(Path(folder, "plan"), clips=int(size), config=config))


def write_sidecars(folder: str) -> dict[str, Any]:
    """A sidecar of every unit of the plan, and a tar that is a hole: the files of workers, without their work."""
    import stub_build

    from flowmask.data_pipeline.build.records import Rows, example_rows
    from flowmask.data_pipeline.cache.shards import RecordPlace, shard_name, sidecar_name
    from flowmask.data_pipeline.plan.units import read_plan

    out, plan = Path(folder), read_plan(Path(folder, "plan"))
    assert plan is not None
    (out / "shards").mkdir()
    text = np.zeros((stub_build.TOKENS, stub_build.TEXT_DIM), np.float32)
    for unit in range(plan.clip_units):
        rows = Rows(records=0, text_dim=stub_build.TEXT_DIM, shapes=[(1, stub_build.SIDE, stub_build.SIDE)])
        for number, (clip, _) in enumerate(plan.unit_clips(unit)):
            at = number * 4096
            names = ("video.mean", "video.logvar", "mask.0.mean", "text.0", "text.1")
            place = RecordPlace((at + 512, 900), {name: (at + 2048 + i * 256, 256) for i, name in enumerate(names)})
            expressions = [{"mask": 0, "text_id": k} for k in range(len(clip.sentences))]
            tensors = {"text.0": text, "text.1": text}
            meta = {"expressions": expressions, "view": clip.view}
            rows.examples += example_rows(meta, tensors, place, unit=unit, shape=0)  # type: ignore[arg-type]
            rows.records += 1
        size = rows.records * 4096
        with (out / "shards" / shard_name(unit)).open("wb") as file:
            file.truncate(size)
        sidecar = rows.sidecar(
            unit=unit, size=size, sha256=f"{unit:064x}", dropped_empty_masks=0, quarantined=[], made_with={"a": "stub"}
        )
        (out / "shards" / sidecar_name(unit)).write_bytes(sidecar.to_bytes())
    return {}


def finalise_clips(folder: str) -> dict[str, Any]:
    import stub_build  # noqa: F401  (what it stands in for, torch, is not measured)

    from flowmask.data_pipeline.build.finalise import finalise
    from flowmask.data_pipeline.plan.units import read_plan

    plan = read_plan(Path(folder, "plan"))
    assert plan is not None
    return measured(lambda: finalise(Path(folder), plan))


@part("workers")
def workers(arguments: Namespace) -> None:
    """Build with forked workers: filesystem calls, and whether the bytes are those of one worker."""

    def rows() -> Iterator[Sequence[object]]:
        bytes_of_one = None
        for count in arguments.workers:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                command = [
                    sys.executable,
                    str(Path(__file__).with_name("stub_build.py")),
                    f"{folder}/cache",
                    "--hashes",
                ]
                command += ["--workers", str(count), "--clips", str(arguments.clips), "--clips-per-shard", "8"]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            bytes_of_one = bytes_of_one or found["files"]
            equal = "yes" if found["files"] == bytes_of_one else "NO"
            asked, units = found["operations"], found["units"]
            each = (f"{asked['clips'] / units:.1f}", f"{asked['finalise'] / units:.1f}")
            yield count, units, *each, f"{found['cpu_s']:.1f}", f"{found['peak_mib']:.0f}", equal

    head = ("workers", "units", "requests a unit", "and of finalise", "CPU s", "MiB of the largest", "bytes of one")
    table(head, rows())


@part("status")
def status(arguments: Namespace) -> None:
    """`flowmask cache status` by the number of shards, for a build near its end and for a finished cache."""

    def rows() -> Iterator[Sequence[object]]:
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                fresh("write_begun", folder, size)
                begun = fresh("status_of", folder)
                fresh("write_finished", folder, size)
                finished = fresh("status_of", folder)
            yield size, f"{begun['cpu_s']:.2f}", f"{finished['cpu_s']:.2f}", f"{finished['peak_mib']:.0f}"

    table(("shards", "being built: CPU s", "finished: CPU s", "MiB"), rows())


def write_begun(folder: str, size: str) -> dict[str, Any]:
    """A build with one missing shard, made of file names."""
    from flowmask.data_pipeline.cache.manifest import Fingerprint
    from flowmask.data_pipeline.cache.shards import sidecar_name
    from flowmask.data_pipeline.plan.cost import ViewCost
    from flowmask.models.stored.sealed import seal

    out, shards = Path(folder), int(size)
    for name in ("plan", "shards", "work/claims", "work/texts"):
        (out / name).mkdir(parents=True)
    for name, length in (("clips.jsonl", shards * CLIPS_PER_SHARD), ("texts.jsonl", 256)):
        (out / "plan" / name).touch()
        os.truncate(out / "plan" / name, length)
    (out / "work/texts/text-000000.safetensors").touch()
    fields = {"cache.clips_per_shard": CLIPS_PER_SHARD}
    identity = Fingerprint(total="0" * 64, text="0" * 64, video="0" * 64, masks="0" * 64, fields=fields)
    count = shards * CLIPS_PER_SHARD
    plan = {"files": {}, "fingerprint": identity.model_dump(), "clips": count, "texts": 256, "facts": {}}
    (out / "plan/plan.json").write_bytes(seal({**plan, "costs": [asdict(ViewCost(clips=count))]}))
    for unit in range(shards - 1):
        (out / "shards" / sidecar_name(unit)).touch()
    return {}


def write_finished(folder: str, size: str) -> dict[str, Any]:
    """The manifest of a cache with `size` shards."""
    from flowmask.data_pipeline.cache import manifest
    from flowmask.data_pipeline.cache.shards import shard_name

    count, examples = int(size), int(size) * CLIPS_PER_SHARD * SENTENCES
    entry = {"size": 300_000_000, "records": CLIPS_PER_SHARD, "made_with": 0}
    shards = [
        {**entry, "file": shard_name(n), "sha256": f"{n:064x}", "examples": [examples // count]} for n in range(count)
    ]
    hashes = dict.fromkeys(("total", "text", "video", "masks"), "0" * 64)
    facts = manifest.Manifest.model_validate(
        {
            "fingerprint": {**hashes, "fields": {}},
            "dtype": "bfloat16",
            "views": 1,
            "latent_channels": 1,
            "latents_mean": [0.0],
            "latents_std": [1.0],
            "text_dim": 4096,
            "longest_text_tokens": 15,
            "pixel_norm": "half",
            "lowercase": True,
            "clips": count * CLIPS_PER_SHARD,
            "examples": examples,
            "dropped_empty_masks": 0,
            "buckets": [{"frames": 17, "height": 480, "width": 832, "first": [0], "examples": [examples]}],
            "index": {"size": 1, "sha256": "0" * 64},
            "environments": [{}],
            "shards": shards,
        }
    )
    Path(folder, manifest.FILE).write_bytes(facts.to_bytes())
    return {}


def status_of(folder: str) -> dict[str, Any]:
    from flowmask.data_pipeline.build.status import status as status_of_cache

    return measured(lambda: status_of_cache(Path(folder)))


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 200])
    parser.add_argument("--clips", type=int, default=12_800, help="of `workers`, 8 a shard")
    parser.add_argument("--folder", type=Path, help="where to write; default: the place for temporary files")


if __name__ == "__main__":
    run(__doc__ or "", globals(), options)
