"""A cache build by many processes around a stub encoder: the other parts are real, from plan to index; no torch.

    python benchmarks/stub_build.py OUT --clips 12800 --workers 200

Workers are forked, so that hundreds fit on one machine. Each counts its filesystem calls, pass by pass. A clip is one
frame of 16x16. Its latent is 64 numbers computed from the pixels, so the bytes are a function of the clip.
"""

import argparse
import hashlib
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from questions import Questions, asked_of

sys.modules["safetensors.torch"] = safetensors.numpy  # used to write shards: the stub's tensors are numpy arrays

from flowmask.data_pipeline.build.clip_pass import ClipPass  # noqa: E402
from flowmask.data_pipeline.build.finalise import clear_work  # noqa: E402
from flowmask.data_pipeline.build.sharing import SharedBuild  # noqa: E402
from flowmask.data_pipeline.cache.manifest import LONG_TEXT, Fingerprint  # noqa: E402
from flowmask.data_pipeline.cache.quarantine import Quarantine  # noqa: E402
from flowmask.data_pipeline.cache.shards import write_file  # noqa: E402
from flowmask.data_pipeline.claim.claims import claimed, share_out  # noqa: E402
from flowmask.data_pipeline.clip.decode import DecodedClip  # noqa: E402
from flowmask.data_pipeline.config import CacheBuildConfig  # noqa: E402
from flowmask.data_pipeline.plan import units  # noqa: E402
from flowmask.data_pipeline.plan.plan_file import SENTENCES_PER_UNIT, text_unit_path  # noqa: E402
from flowmask.data_pipeline.sources.base import Expression, LazyVideos, Video, VideoSet  # noqa: E402
from flowmask.models.errors import CacheError  # noqa: E402
from flowmask.models.folders.output_folder import OutputFolder  # noqa: E402

CLIPS_PER_VIDEO, SIDE, CHANNELS, TEXT_DIM, TOKENS = 100, 16, 16, 8, 3


class DotVideo(Video):
    """A video of grey frames with one dot; every frame is a clip."""

    has_masks = True

    def __init__(self, number: int, *, frames: int):
        self.number, self.video_id = number, f"video{number:06d}"
        self.frame_names = range(frames)  # type: ignore[assignment]
        texts = ("the dot", f"the dot of kind {number % 50_000}")
        self.expressions = tuple(Expression(exp_id=str(i), text=text, anno_ids=("0",)) for i, text in enumerate(texts))

    @property
    def size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def frames(self, ids: Sequence[int]) -> list[NDArray[np.uint8]]:
        return [np.full((SIDE, SIDE, 3), (self.number + i) % 251, np.uint8) for i in ids]

    def mask(self, anno_ids: Sequence[str], ids: Sequence[int]) -> NDArray[np.bool_]:
        masks = np.zeros((len(ids), SIDE, SIDE), np.bool_)
        for place, i in enumerate(ids):
            masks[place, (self.number + i) % SIDE, i % SIDE] = True
        return masks

    def files_digest(self) -> str:
        return self.video_id

    def annotated(self, anno_ids: Sequence[str]) -> Collection[int] | None:
        return None


class Dots(VideoSet):
    """A dataset of `clips` clips, made on request."""

    def __init__(self, clips: int):
        self.clips = clips

    def videos(self) -> "LazyVideos[Video]":
        return _DotVideos(self.clips)

    def identity(self) -> dict[str, str]:
        return {"expressions": str(self.clips)}


class _DotVideos(LazyVideos[Video]):
    def __init__(self, clips: int):
        self._clips = clips

    def __len__(self) -> int:
        return -(-self._clips // CLIPS_PER_VIDEO)

    def at(self, place: int) -> DotVideo:
        return DotVideo(place, frames=min(CLIPS_PER_VIDEO, self._clips - place * CLIPS_PER_VIDEO))


class StubEncoder:
    """Latents [16 1 2 2] computed from the pixels, at almost no cost."""

    def encode(self, clips: Iterable[DecodedClip]) -> Iterator[Any]:
        for decoded in clips:
            video = _latent(decoded.frames.tobytes())
            yield SimpleNamespace(
                clip=decoded.clip,
                video_mean=video,
                video_logvar=-np.abs(video),
                mask_means={place: _latent(mask.tobytes()) for place, mask in decoded.masks.items()},
                mask_rles=decoded.rles,
                annotated=decoded.annotated,
            )


class StubEmbeddings:
    """Embeddings of the finished text units, read as in `Embeddings`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def of(self, numbers: Sequence[int]) -> dict[int, dict[int, Any]]:
        found = {}
        for number in numbers:
            unit, place = divmod(number, SENTENCES_PER_UNIT)
            with safetensors.safe_open(text_unit_path(self._folder, unit), framework="np") as file:
                found[number] = {LONG_TEXT: file.get_tensor(f"{place}.{LONG_TEXT}")}
        return found


def _latent(content: bytes, shape: tuple[int, ...] = (CHANNELS, 1, 2, 2)) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")
    return (np.arange(np.prod(shape), dtype=np.float32) * (seed % 9973) % 31 / 31).reshape(shape)


def config_of(out: Path, *, clips_per_shard: int, lease_s: float = 60.0) -> CacheBuildConfig:
    """One frame a clip, at its own size, as float32."""
    one = {"frames": 1, "short_side": SIDE, "long_side": SIDE, "size_multiple": SIDE, "augment": False}
    cache = {"clips_per_shard": clips_per_shard, "dtype": "float32", "device": "cpu", "decode_threads": 1}
    return CacheBuildConfig.model_validate(
        {
            "out": out,
            "model": {"wan": out},
            "data": {"source": "videos", "root": out},
            "clip": one,
            "cache": {**cache, "lease_s": lease_s},
        }
    )


def write_plan(folder: Path, *, clips: int, config: CacheBuildConfig) -> None:
    """The plan of a build of `clips` clips, by the real planner."""
    fields = {f"cache.{name}": value for name, value in config.cache.model_dump(mode="json").items()}
    identity = Fingerprint(total="0" * 64, text="0" * 64, video="0" * 64, masks="0" * 64, fields=fields)
    facts = {"latent_channels": CHANNELS, "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    units.write_plan(
        folder, Dots(clips), config=config, fingerprint=identity, facts={**facts, "role": "train", "leaks": None}
    )


def work(config: CacheBuildConfig, *, clips: int, worker: int, workers: int, begin: Callable[[str], None]) -> None:
    """One worker's part of the build, in the passes of `Build`; `begin` gets the name of each pass."""
    shared = SharedBuild(Path(config.out), config.cache.lease_s, worker=worker, workers=workers)
    begin("plan")
    shared.out.mkdir(parents=True, exist_ok=True)
    if units.read_plan(shared.out / units.FOLDER) is None:
        OutputFolder(shared.out, units.CACHE)
    shared.shards.mkdir(exist_ok=True)
    plan = shared.plan(lambda folder: write_plan(folder, clips=clips, config=config))
    begin("text")
    try:
        _encode(config, shared, plan, clips=clips, begin=begin)
    except (CacheError, FileNotFoundError):  # the others have finished and removed `work`, as in `Build`
        if not shared.finished.exists():
            raise
    clear_work(shared.work)


def _encode(
    config: CacheBuildConfig, shared: SharedBuild, plan: units.BuildPlan, *, clips: int, begin: Callable[[str], None]
) -> None:
    shared.texts.mkdir(parents=True, exist_ok=True)

    def write_sentences(unit: int) -> None:
        embeddings = {
            f"{place}.{LONG_TEXT}": _latent(text.encode(), (TOKENS, TEXT_DIM))
            for place, text in enumerate(plan.unit_texts(unit))
        }
        write_file(text_unit_path(shared.texts, unit), safetensors.numpy.save(embeddings))

    share_out(shared.sentences(plan), write_sentences)
    begin("clips")
    quarantine = Quarantine(shared.out, shards=shared.shards, clips=clips, videos=0, fraction=0.0)
    make = ClipPass(
        config=config,
        plan=plan,
        source=Dots(clips),
        shards=shared.shards,
        embeddings=StubEmbeddings(shared.texts),  # type: ignore[arg-type]
        quarantine=quarantine,
        encoder=StubEncoder,  # type: ignore[arg-type]
        made_with={"encoder": "stub"},
    )
    make.run(lambda: claimed(shared.clips(plan)))
    begin("finalise")
    quarantine.check()
    shared.finalise(plan, make=make.write_unit)


def build(out: Path, *, clips: int, workers: int, clips_per_shard: int = 64, lease_s: float = 60.0) -> dict[str, Any]:
    """Build with `workers` processes; seconds, and filesystem calls by pass, over all processes."""
    config = config_of(out, clips_per_shard=clips_per_shard, lease_s=lease_s)
    began = time.perf_counter()
    children = []
    for worker in range(workers):
        reader, writer = os.pipe()
        if pid := os.fork():
            os.close(writer)
            children.append((pid, reader))
            continue
        os.close(reader)
        code = 1
        try:
            asked = Questions()
            asked.listen()
            work(config, clips=clips, worker=worker, workers=workers, begin=asked.begin)
            assert "torch" not in sys.modules
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            with os.fdopen(writer, "w") as file:
                json.dump({"passes": asked.passes, "peak_mib": peak, "cpu_s": time.process_time()}, file)
            code = 0
        except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    said = [os.fdopen(reader).read() for _, reader in children]
    ended = [os.waitpid(pid, 0)[1] for pid, _ in children]
    assert ended == [0] * workers, ended
    told = [json.loads(one) for one in said]
    total: dict[str, Counter[str]] = {}
    for one in told:
        for name, count in one["passes"].items():
            total.setdefault(name, Counter()).update(count)
    return {
        "clips": clips,
        "workers": workers,
        "units": -(-clips // clips_per_shard),
        "wall_s": time.perf_counter() - began,
        "cpu_s": sum(one["cpu_s"] for one in told),
        "peak_mib": max(one["peak_mib"] for one in told),
        "operations": {name: asked_of(count) for name, count in total.items()},
        "calls": total,
    }


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of a finished cache, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=12_800)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clips-per-shard", type=int, default=64)
    parser.add_argument("--hashes", action="store_true", help="also the hash of every file")
    arguments = parser.parse_args()
    found = build(
        arguments.out, clips=arguments.clips, workers=arguments.workers, clips_per_shard=arguments.clips_per_shard
    )
    if arguments.hashes:
        found["files"] = contents(arguments.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
