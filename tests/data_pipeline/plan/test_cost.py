"""Laws of a build's cost estimate, and of the work that a build does only once."""

import gc
import os
import weakref

import pytest
from build_workers import contents
from safetensors.torch import load

from flowmask.data_pipeline.build.build import Build, build
from flowmask.data_pipeline.build.progress import BuildProgress
from flowmask.data_pipeline.plan.cost import BuildSpeed, ViewCost, describe
from flowmask.data_pipeline.plan.units import read_plan
from flowmask.models.weights.wan import WanFolder


def told(config, **worker) -> list[BuildProgress]:
    said: list[BuildProgress] = []
    build(config, on_progress=said.append, **worker)
    return said


def notes(said: list[BuildProgress]) -> list[str]:
    return [progress.note for progress in said if progress.note]


def test_the_cost_of_a_view_is_said_once_before_anything_is_encoded(make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    said = told(config)
    (note,) = notes(said)
    phases = [progress.phase for progress in said]
    assert phases.index("cost") < phases.index("text") < phases.index("clips")
    assert "cost per view: 6 clips, 24 encoder passes" in note and "2 views" in note and "1 worker" in note
    assert notes(told(config)) == []  # a complete cache: nothing is measured
    (config.out / "manifest.json").unlink()
    assert notes(told(config)) == []  # the build has begun


def test_bytes_do_not_depend_on_the_warm_up(cache, make_config, tmp_path):
    config = make_config(tmp_path / "cache")
    assert notes(told(config, worker=1, workers=2)) == []
    assert contents(config.out) == contents(cache)


def test_counted_passes_and_bytes_are_those_of_the_shards(make_config, tmp_path):
    config = make_config(tmp_path / "cache", cache={"drop_empty_masks": False})
    build(config)
    plan = read_plan(config.out / "plan")
    masks = latents = texts = clips = 0
    for unit in range(plan.clip_units):
        for clip, numbers in plan.unit_clips(unit):
            clips, masks, texts = clips + 1, masks + len(clip.masks), texts + len(set(numbers))
    costs = plan.costs
    assert sum(cost.clips for cost in costs) == clips
    assert sum(cost.passes for cost in costs) == clips + masks
    assert sum(cost.sentences for cost in costs) == texts
    latents = stored_latent_values(config)
    assert sum(cost.latent_values for cost in costs) == latents


def stored_latent_values(config) -> int:
    import tarfile

    total = 0
    for path in sorted((config.out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".safetensors"):
                    stored = load(tar.extractfile(member).read())
                    total += sum(tensor.numel() for name, tensor in stored.items() if not name.startswith("text"))
    return total


def test_hours_and_bytes_follow_from_what_was_measured():
    views = [ViewCost(clips=10, passes=30, pixels=3600_000, latent_values=2**29, sentences=0) for _ in range(2)]
    line = describe(views, BuildSpeed(100.0, 36.0, 0.0), texts=100, value_bytes=2, workers=2)
    assert line.startswith(
        "cost per view: 10 clips, 30 encoder passes, 1.0 GiB, about 5.0 h on 2 workers; 2 views: 2.0 GiB"
    )
    assert line.endswith("about 10.0 h; 100 sentences, once: about 0.5 h (1800 s)")


def test_of_the_text_encoder_and_the_vae_one_is_gone_before_the_other_comes(make_config, tmp_path, monkeypatch):
    """In one job, with the warm-up, which loads both models."""
    loaded: list[tuple[str, weakref.ref]] = []

    def remembered(name, load):
        def loads(self, *arguments):
            gc.collect()
            assert {other for other, model in loaded if model() is not None} <= {name}
            found = load(self, *arguments)
            loaded.append((name, weakref.ref(found.model if name == "text_encoder" else found)))
            return found

        return loads

    for name in ("text_encoder", "vae"):
        monkeypatch.setattr(WanFolder, name, remembered(name, getattr(WanFolder, name)))
    Build(make_config(tmp_path / "cache")).run()
    assert [name for name, _ in loaded] == ["vae", "vae", "text_encoder", "vae"], "plan, warm-up, sentences, clips"


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """The parts whose weights were read for a hash."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    parts: list[str] = []
    identity = WanFolder.identity

    def count(self, part: str) -> str:
        parts.append(part)
        return identity(self, part)

    monkeypatch.setattr(WanFolder, "identity", count)
    return parts


def test_weights_are_hashed_once_and_again_only_when_their_files_change(hashed, make_config, tiny_wan, tmp_path):
    import shutil

    shutil.copytree(tiny_wan, tmp_path / "wan")
    config = make_config(tmp_path / "cache", wan=tmp_path / "wan")
    build(config)
    assert sorted(hashed) == ["text_encoder", "tokenizer", "vae"]
    build(config)  # the cache is complete
    (config.out / "manifest.json").unlink()
    build(config)  # a worker that joins later
    assert len(hashed) == 3
    file = next((tmp_path / "wan/vae").glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    build(config)
    assert hashed[3:] == ["vae"]


def test_weights_are_hashed_by_one_of_several_workers_without_a_home(hashed, make_config, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    config = make_config(tmp_path / "cache")
    first = Build(config)
    first._plan()
    Build(config, worker=1, workers=2).run()
    assert sorted(hashed) == ["text_encoder", "tokenizer", "vae"]
