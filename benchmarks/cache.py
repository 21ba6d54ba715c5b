"""How well a build uses the machine: one worker with overlapped stages, on clips that are slow to encode or to decode.

    python benchmarks/cache.py [--json] [--clips N] [--rounds N] [--folder DIR] [--memory]

encode_bound: encoding costs at least four times decoding and writing; `busy` is the encoder's share of the wall time.
decode_bound: large frames, small clips; `ratio` is wall time over (CPU seconds of all stages / cores). Both cover the
clips' phase without loading weights, in the best round, since other work takes cores away (`load` shows it).
`wanted_cores` is valid on a busy machine too: the mean number of threads that ran or waited for a core.
--memory: peak resident memory of a worker at 1,000 and at 20,000 clips (half an hour).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowmask.data_pipeline.build.build import Build
from flowmask.data_pipeline.build.progress import BuildProgress
from flowmask.data_pipeline.build.stage_clock import Busy, Stage
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.formats import rle
from flowmask.models.weights.tiny_wan import write_tiny_wan

CORES = len(os.sched_getaffinity(0))
STAGES: tuple[Stage, ...] = ("decode", "encode", "write")
_MEMORY_CLIPS = (1_000, 20_000)
_WORKER = """
import sys
from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
build(CacheBuildConfig.model_validate_json(sys.argv[1]))
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(int(peak.split()[1]) // 1024)
"""


@dataclass(frozen=True)
class Case:
    """Clips of `frames` frames, read at `source` px (height, width) and cached with a short side of `short_side`."""

    name: str
    source: tuple[int, int]
    short_side: int
    frames: int = 9


ENCODE_BOUND = Case("encode_bound", source=(96, 96), short_side=96)
DECODE_BOUND = Case("decode_bound", source=(1080, 1920), short_side=16)


def write_dataset(folder: Path, case: Case, *, clips: int) -> None:
    """One video a clip in the layout of MeViS: moving noise, with one rectangle as the mask."""
    height, width = case.source
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((width, height)))
    mask = np.zeros(case.source, bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    names = [f"{i:05d}" for i in range(case.frames)]
    videos: dict[str, Any] = {}
    for clip in range(clips):
        frames = folder / "JPEGImages" / f"v{clip:06d}"
        frames.mkdir(parents=True)
        for i, name in enumerate(names):
            Image.fromarray(np.roll(picture, clip + i, axis=1)).save(frames / f"{name}.jpg", quality=90)
        exp = {"0": {"exp": f"rectangle number {clip % 50}", "anno_id": [clip]}}
        videos[frames.name] = {"frames": names, "expressions": exp}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": videos}))
    entry = json.dumps([rle.encode(mask)] * case.frames)
    with (folder / "mask_dict.json").open("w") as file:
        for clip in range(clips):
            file.write(f'{"," if clip else "{"}"{clip}": {entry}')
        file.write("}")


def config_of(folder: Path, case: Case, *, out: Path) -> CacheBuildConfig:
    size = {"short_side": case.short_side, "long_side": 2 * case.short_side, "size_multiple": 16}
    return CacheBuildConfig.model_validate(
        {
            "out": out,
            "model": {"wan": folder / "wan"},
            "data": {"source": "mevis", "root": folder / case.name, "split": "train"},
            "clip": {"frames": case.frames, "augment": False, **size},
            "cache": {"clips_per_shard": 16, "device": "cpu", "decode_threads": max(2, CORES)},
        }
    )


def _core_seconds() -> float:
    """Seconds in which threads of this process ran, or waited for a core."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has just ended
            ran, waited, _ = path.read_text().split()
            total += int(ran) + int(waited)
    return total / 1e9


class Watch:
    """Stage seconds and wall time of the clips' phase of one build."""

    def __init__(self, config: CacheBuildConfig):
        self._build = Build(config, on_progress=self._told)
        self._phase = ""
        self.started = self.ended = 0.0
        self.before: dict[Stage, Busy] = {}

    def _told(self, progress: BuildProgress) -> None:
        if progress.phase == "clips" != self._phase:
            _ = self._build.encoder  # load its weights before the clock starts
            self.before = {stage: self._build.clock.busy(stage) for stage in STAGES}
            self.started = time.perf_counter()
            self.first = self.last = (_core_seconds(), self.started)
        elif progress.phase == "clips":  # not later: the pipeline's threads end with this phase
            self.last = (_core_seconds(), time.perf_counter())
        if progress.phase == "finalise":
            self.ended = time.perf_counter()
        self._phase = progress.phase

    def run(self) -> dict[str, Any]:
        self._build.run()
        after = {stage: self._build.clock.busy(stage) for stage in STAGES}
        cpu = {stage: after[stage].cpu_s - self.before[stage].cpu_s for stage in STAGES}
        wall = self.ended - self.started
        encoding = after["encode"].wall_s - self.before["encode"].wall_s
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "busy": encoding / wall,
            "ratio": wall / (sum(cpu.values()) / CORES),
            "wanted_cores": (self.last[0] - self.first[0]) / (self.last[1] - self.first[1]),
            "encode_over_rest": cpu["encode"] / (cpu["decode"] + cpu["write"]),
        }


def measure(folder: Path, case: Case, *, clips: int, rounds: int) -> dict[str, Any]:
    """The best round: the result of the pipeline when it has all cores."""
    if not (folder / case.name).exists():
        write_dataset(folder / case.name / "train", case, clips=clips)
    results = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            result = Watch(config_of(folder, case, out=Path(out) / "cache")).run()
        results.append(result | {"load": os.getloadavg()[0], "clips": clips})
    best = max(results, key=lambda found: found["busy"] if case is ENCODE_BOUND else -found["ratio"])
    assert case is not ENCODE_BOUND or best["encode_over_rest"] >= 4, "these clips are not dear to encode"
    return best


def peak_memory_mb(folder: Path, *, clips: int) -> int:
    """Peak resident memory of one worker process that plans, builds and finalises."""
    case = Case(f"memory_{clips}", source=(32, 32), short_side=32, frames=5)
    write_dataset(folder / case.name / "train", case, clips=clips)
    config = config_of(folder, case, out=folder / f"cache_{clips}")
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"clips_per_shard": 64})})
    command = [sys.executable, "-c", _WORKER, config.model_dump_json()]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--memory", action="store_true", help="measure memory too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_tiny_wan(folder / "wan", random_vae=True)
        figures: dict[str, Any] = {"cores": CORES}
        for case in (ENCODE_BOUND, DECODE_BOUND):
            found = measure(folder, case, clips=arguments.clips, rounds=arguments.rounds)
            figures[case.name] = asdict(case) | found
            print(
                f"{case.name}: wall {found['wall_s']:.1f} s, encoder busy {found['busy']:.1%}, wall / (CPU / cores) "
                f"{found['ratio']:.2f}, wanted cores {found['wanted_cores']:.2f}, "
                f"encode / (decode + write) {found['encode_over_rest']:.2f}, "
                f"load {found['load']:.1f}"
            )
        if arguments.memory:
            figures["peak_mb"] = {str(n): peak_memory_mb(folder, clips=n) for n in _MEMORY_CLIPS}
            print(f"peak resident memory in MiB by clips: {figures['peak_mb']}")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
