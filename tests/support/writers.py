"""Every command that writes results, small and in this process: the results are made up, the writing is real."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_export import PARITY, write_published
from rich.console import Console
from safetensors.torch import load_file, save_file

from flowmask.data_pipeline.cache.shards import remove_leftovers, write_file
from flowmask.data_pipeline.plan.units import CACHE
from flowmask.data_pipeline.show import page
from flowmask.data_pipeline.show.inspect_page import inspect
from flowmask.launch.configs import copy_configs
from flowmask.launch.curriculum.curriculum import _claimed
from flowmask.launch.demo import demo
from flowmask.launch.demo.world import write_once
from flowmask.launch.jobs.job import save_config
from flowmask.launch.reproduce import reproduce
from flowmask.launch.toy import toy
from flowmask.models.config import AskedConventions
from flowmask.models.files import write_atomically
from flowmask.models.folders.output_folder import OutputFolder
from flowmask.models.weights import tiny_wan
from flowmask.models.weights.import_wan import import_wan
from flowmask.models.weights.original import TEXT
from flowmask.trainer.explain.run_page import page_file as run_page_file
from flowmask.trainer.explain.run_page import write_run_page
from flowmask.trainer.explain.timeline import TimelineFile
from flowmask.trainer.phases import Spent
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.import_flowrvs import import_flowrvs
from flowmask.trainer.predict.predictions import PredictionFolder
from flowmask.trainer.score.archive import write_archive
from flowmask.trainer.score.compare.comparison_page import page_file, write_page
from flowmask.trainer.score.compare.differences import compare
from flowmask.trainer.score.store import EvaluationStore
from flowmask.trainer.state import checkpoint_write
from flowmask.trainer.state.run_folder import RunFolder

OLDER = Path(__file__).parents[1] / "golden" / "older"
FACTS = {"video": "clip.mp4", "checkpoint": "run", "weights": {}, "height": 2, "width": 2, "fps": 1, "frames": ["0"]}
CONFIG = {"checkpoint": "run", "train": {}, "model": {}, "data": {}}
Writer = Callable[[Path], object]


def predict(out: Path) -> None:
    prompts, slugs = ["a dog", "two cats"], ["a-dog", "two-cats"]
    folder = PredictionFolder(out, video="clip.mp4", prompts=prompts)
    with folder.scratch() as place:
        for slug in slugs:
            (place / slug).mkdir()
            (place / slug / "0.png").write_text(slug)
            (place / f"{slug}.mp4").write_text(slug)
        (place / "overlay.mp4").write_text("both")
        folder.publish(place, slugs, [{"area_px": [1]}, {"area_px": [2]}], FACTS)


def evaluate(out: Path) -> None:
    store = EvaluationStore(out, "0" * 16)
    with store.claim(0):
        for video in ("a", "b"):
            if store.record(video) is None:
                store.start_video(video)
                (store.mask_folder(f"{video}/0") / "00000.png").write_text(video)
                store.write_record(video, {"frames": 1})

        def build(masks: Path, place: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
            (place / "report.html").write_text(page.document("FlowMask evaluation", []))
            (place / "overlays").mkdir()
            (place / "overlays" / "a_0.mp4").write_text("a")
            save_config(place, CONFIG)
            write_archive(place, masks=masks, layout="mevis")
            return {"videos": 2, "expressions": 2, "per_expression": {}, "weights": {}}

        store.publish_if_complete(["a", "b"], build)


def train(out: Path) -> None:
    folder = RunFolder(out, patience_s=0.5)
    checkpoints = out / "checkpoints"
    checkpoint_write.clean(checkpoints)
    folder.write_config(CONFIG)
    folder.open_metrics(after_step=0)
    for step in (1, 2):
        folder.add_row({"step": step})
        beside = checkpoints / f".writing_step_{step:08d}_1"
        beside.mkdir(parents=True)
        (beside / "rank_00000.safetensors").write_text("weights")
        final = checkpoints / f"step_{step:08d}"
        checkpoint_write.publish(beside, final, document={"step": step}, links=("latest", "best"))
        checkpoint_write.prune(checkpoints, keep_last=1, milestone_every_steps=None)
    folder.sync()
    folder.close()


def build_cache(out: Path) -> None:
    OutputFolder(out, CACHE)
    (out / "plan").mkdir(exist_ok=True)
    remove_leftovers(out / "plan")
    write_file(out / "plan" / "plan.json", b'{"fingerprint": {}}')
    write_file(out / "manifest.json", b'{"fingerprint": {}}')
    save_config(out, CONFIG)


def curriculum(out: Path) -> None:
    asked: Any = SimpleNamespace(out=out, stages=[], path=Path("curriculum.yaml"))
    with _claimed(asked):
        pass


def run_demo(out: Path) -> None:
    def wan(root: Path) -> None:
        (root / "wan").mkdir()
        (root / "wan" / "weights").write_text("weights")

    def stages(run: demo.DemoRun) -> None:
        run._note("cache_s", 1.0)
        write_once(run.out / "wan", wan)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo.DemoRun, "run", stages)
        patched.setattr(demo, "collect", lambda out: {})
        patched.setattr(demo, "show", lambda *_: None)
        patched.setattr(demo.time, "time", lambda: 0.0)
        demo.run_demo(out, demo.Profile.SMOKE, console=Console(quiet=True))


def run_study(out: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reproduce, "run_curriculum", lambda *_, **__: 0)
        out.mkdir(parents=True, exist_ok=True)
        patched.chdir(out)  # its files contain the folder's path
        reproduce.reproduce(Path("configs/paper.yaml"), ["out=."], profile=None, wait=True, dry_run=False)


def compare_evaluations(out: Path) -> None:
    file = page_file(out / "compare.html")
    file.refuse()
    write_page(file, compare([OLDER / "evaluation", OLDER / "evaluation"]))


def report_run(run: Path, out: Path) -> None:
    file = run_page_file(run, out / "run.html")
    file.refuse()
    write_run_page(run, file)


def write_tiny_wan(out: Path) -> None:
    def parts(folder: Path, **_: Any) -> None:
        (folder / "vae").mkdir(parents=True)
        (folder / "vae" / "weights").write_text("weights")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tiny_wan, "_write_parts", parts)
        tiny_wan.write_tiny_wan(out / "wan")


def write_toy(out: Path) -> None:
    def some(root: Path) -> None:
        (root / "train").mkdir(parents=True)
        (root / "train" / "meta_expressions.json").write_text("{}")

    def wan(place: Path, **_: Any) -> None:
        write_once(place, lambda root: some(root / place.name))

    def example(dataset: Path, path: Path) -> list[str]:
        write_atomically(path, "film")
        return ["a dog", "two cats"]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(toy, "_datasets", lambda seed: {"mevis": some, "revos": some})
        patched.setattr(toy, "write_wan", wan)
        patched.setattr(toy, "write_example", example)
        toy.write_toy(out, seed=0, say=pytest.fail)


NAMES = (
    *("predict", "evaluate, archive", "train", "cache build", "curriculum", "demo", "reproduce"),
    *("export file", "export folder", "import", "import wan", "tiny-wan", "cache inspect", "compare"),
    *("report", "configs --copy", "toy"),
)


def writers(lab: Path) -> dict[str, Writer]:
    """By the command's name; lab: a folder for their inputs."""
    source, dit, original = str(write_published(lab)), lab / "dit.pth", lab / "original.safetensors"
    text = load_file(PARITY / "text" / "encoder" / "model.safetensors")
    save_file({TEXT.original(name): tensor for name, tensor in text.items()}, original)
    TimelineFile(lab / "trained", rank=0, world_size=1).add(10, Spent(10, 1.0, {"read": 0.2, "forward": 0.8}))
    found: dict[str, Writer] = {
        "predict": predict,
        "evaluate, archive": evaluate,
        "train": train,
        "cache build": build_cache,
        "curriculum": curriculum,
        "demo": run_demo,
        "reproduce": run_study,
        "export file": lambda out: export(source, format="safetensors", out=out / "weights.safetensors"),
        "export folder": lambda out: export(source, format="diffusers", out=out / "weights", wan=lab / "wan"),
        "import": lambda out: import_flowrvs(
            dit, decoder=lab / "decoder.pth", out=out / "weights", conventions=AskedConventions()
        ),
        "import wan": lambda out: import_wan(original, out / "wan"),
        "tiny-wan": write_tiny_wan,
        "cache inspect": lambda out: inspect(OLDER / "cache", out=out / "cache.html", examples=0),
        "compare": compare_evaluations,
        "report": lambda out: report_run(lab / "trained", out),
        "configs --copy": copy_configs,
        "toy": write_toy,
    }
    assert tuple(found) == NAMES
    return found
