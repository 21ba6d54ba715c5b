"""Every file of ours that we read, with its reader: a new file is one entry in FILES."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mutants import Change, change_bytes, change_json, change_lines, resealed

from flowmask.data_pipeline.build.records import read_sidecar
from flowmask.data_pipeline.build.status import status
from flowmask.data_pipeline.check.verify_shard import Storage, WrongError, read_shard
from flowmask.data_pipeline.config import LoaderConfig
from flowmask.data_pipeline.formats.json_members import Places, members
from flowmask.data_pipeline.formats.plain_pickle import read_plain_pickle
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.data_pipeline.read.batches import open_batches, plan_for
from flowmask.data_pipeline.read.reader import NEEDS, CacheReader
from flowmask.data_pipeline.read.stream import StreamReader
from flowmask.launch.config import load_job
from flowmask.launch.jobs.evaluate import EvaluateJob
from flowmask.launch.jobs.train import TrainJob
from flowmask.launch.watch.runs import find, look_at_all
from flowmask.models.errors import CacheError
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.weights import load_dit, part_of
from flowmask.trainer.run.guard import SpikeGuard
from flowmask.trainer.state.checkpoint import read_run
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track import spool
from flowmask.trainer.track.points import StepPoints


@dataclass(frozen=True)
class Readable:
    """A file below the lab's folder, and its reader.

    faithful: the reader gives the maker's values, or refuses. False: the file only informs, or `verify` alone checks
    it, and only the other laws hold.
    """

    file: str
    read: Callable[[Path], Any]
    changes: tuple[Change, ...]
    faithful: bool = True


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def read_cache(lab: Path) -> Any:
    """Every example of the cache with its record and sentence, and the manifest."""
    reader, found = CacheReader(lab / "cache"), []
    for bucket in reader.buckets:
        for first, count in zip(bucket.first, bucket.counts, strict=True):
            batch = reader.read(np.arange(first, first + count), needs=NEEDS, text_tokens=256)
            found += [
                (
                    name,
                    digest(
                        tensor.view(-1).numpy().view(np.uint8) if tensor.dtype.itemsize == 1 else tensor.float().numpy()
                    ),
                )
                for name, tensor in sorted(batch.items())
            ]
            found += [(reader.record(i), reader.sentence(i)) for i in range(first, first + count)]
    reader.close()
    return found, reader.manifest


def read_stream(lab: Path) -> Any:
    reader = StreamReader(LoaderConfig(cache=lab / "cache", mode="stream", retries=0, shuffle_examples=8))
    loader = open_batches(
        reader, plan_for(reader, global_batch=2, seed=0, remainder="carry"),
        rank=0, world_size=1, micro_batch=1, needs=NEEDS, text_tokens=256, prefetch_batches=1,
    )  # fmt: skip
    with loader:
        steps = [batch for _ in range(4) for batch in next(loader)]
    return [digest(batch.video_mean.float(), batch.mask_mean.float(), batch.text.float()) for batch in steps], [
        batch.example_ids.tolist() for batch in steps
    ]  # fmt: skip


def verify_shard(lab: Path) -> Any:
    storage = Storage("bfloat16", 16)
    try:
        return read_shard(lab / "cache/shards/000000.tar", unit=0, storage=storage)
    except WrongError as error:
        raise CacheError(str(error)) from error


def read_weights(source: str, lab: Path) -> Any:
    loaded = load_dit(str(lab / source))
    settings = {name: value for name, value in loaded.settings.items() if name != "weights"}
    return part_of(str(lab / source)).name, loaded.sha256, settings


def read_checkpoint(lab: Path) -> Any:
    (checkpoint,) = (lab / "run/checkpoints").glob("step_*")
    document = read_run(checkpoint)
    state = document["state"]
    return document, SpikeGuard(load_run(lab).guard, state=state["guard"]).state(), read_weights("run", lab)


def load_run(lab: Path) -> TrainJob:
    return load_job(lab / "run/config.yaml", TrainJob)


def read_wan(lab: Path) -> Any:
    dit: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    return digest(*(tensor.detach() for _, tensor in sorted(dit.state_dict().items()))), dict(dit.config)


def read_status(lab: Path, folder: str) -> Any:
    return [asdict(status) for status in look_at_all(find([lab / folder]))]


def read_tracked(lab: Path) -> Any:
    """All that a sender takes from a run's folder."""
    run = lab / "run"
    plan = spool.read_plan(run)
    ours = plan is not None and spool.is_plan_ours(run, plan)
    points = StepPoints(run, every_steps=1, after=0).take(100, final=True)
    sent = spool.read_sent(run, uri="http://a:1")
    return plan, ours, spool.copied_from(run), spool.key_of(run) if plan else "", points, sent, read_outbox(run)


def read_outbox(run: Path) -> list[spool.Note]:
    return spool.Outbox(run, offset=0).take()


def go_on(lab: Path) -> Any:
    """The rows that a run keeps when it continues after step 2."""
    run = RunFolder(lab / "run", patience_s=1)
    try:
        run.open_metrics(after_step=2, evaluated_step=2)
    finally:
        run.close()
    return [(lab / "run" / name).read_bytes() for name in ("metrics.jsonl", "evaluations.jsonl")]


def read_places(lab: Path) -> Any:
    path = lab / "mask_dict.json"
    found = list(members(path))
    places = Places(path, ((member, place) for place, member in enumerate(found)))
    return [(member.name, places.number(member.name), places.read(member.name)) for member in found]


JSON = (change_bytes, change_json)
SEALED = (change_bytes, change_json, resealed)
LINES = (change_bytes, change_lines)
BYTES = (change_bytes,)
STATE, RANK = "run/checkpoints/step_00000003/state.json", "run/checkpoints/step_00000003/rank_00000.safetensors"
SUBMISSION = "submitted/launch/0001"
FILES: tuple[Readable, ...] = (
    Readable("cache/manifest.json", read_cache, SEALED),
    Readable("cache/manifest.json", read_stream, SEALED),
    Readable("cache/index.npy", read_cache, BYTES),
    Readable("cache/shards/000000.tar", read_cache, BYTES, faithful=False),
    Readable("cache/shards/000000.tar", read_stream, BYTES, faithful=False),
    Readable("cache/shards/000000.tar", verify_shard, BYTES, faithful=False),
    Readable("cache/shards/000001.json", lambda lab: read_sidecar(lab / "cache/shards", 1), SEALED),
    Readable("cache/plan/plan.json", lambda lab: read_plan(lab / "cache/plan"), SEALED),
    Readable("unfinished/plan/plan.json", lambda lab: status(lab / "unfinished"), SEALED, faithful=False),
    Readable("cache/quarantine.jsonl", lambda lab: status(lab / "cache"), BYTES, faithful=False),
    Readable(STATE, read_checkpoint, SEALED),
    Readable(RANK, read_checkpoint, BYTES),
    Readable("export/flowmask.json", partial(read_weights, "export"), SEALED),
    Readable("export/transformer/diffusion_pytorch_model.safetensors", partial(read_weights, "export"), BYTES),
    Readable("export.safetensors", partial(read_weights, "export.safetensors"), BYTES),
    Readable("export.pth", partial(read_weights, "export.pth"), BYTES),
    Readable("wan/transformer/config.json", read_wan, JSON, faithful=False),
    Readable("wan/transformer/diffusion_pytorch_model.safetensors", read_wan, BYTES, faithful=False),
    Readable("run/config.yaml", load_run, BYTES, faithful=False),
    Readable("run/config.yaml", partial(read_status, folder="run"), BYTES, faithful=False),
    Readable("run/metrics.jsonl", partial(read_status, folder="run"), LINES, faithful=False),
    *(Readable(f"run/{name}", go_on, LINES, faithful=False) for name in ("metrics.jsonl", "evaluations.jsonl")),
    Readable("run/metrics.jsonl", read_tracked, LINES, faithful=False),
    Readable("run/tracking_outbox.jsonl", read_tracked, LINES, faithful=False),
    *(Readable(f"run/{name}", read_tracked, JSON, faithful=False) for name in ("tracking.json", "tracking_sent.json")),
    Readable("evaluation/scores.json", lambda lab: EvaluateJob.status(lab / "evaluation"), JSON, faithful=False),
    *(
        Readable(f"submitted/{name}", partial(read_status, folder="submitted"), JSON, faithful=False)
        for name in (".owner.json", ".ended.json")
    ),
    *(
        Readable(f"{SUBMISSION}/{name}", partial(read_status, folder="submitted"), JSON, faithful=False)
        for name in ("job.json", "slurm.json", "verdict/00000.json")
    ),
    Readable(f"{SUBMISSION}/attempts/00000.jsonl", partial(read_status, folder="submitted"), LINES, faithful=False),
    Readable("curriculum/curriculum.json", partial(read_status, folder="curriculum"), JSON, faithful=False),
    Readable("refs(unc).p", lambda lab: read_plain_pickle(lab / "refs(unc).p"), BYTES, faithful=False),
    Readable("mask_dict.json", read_places, BYTES, faithful=False),
)
