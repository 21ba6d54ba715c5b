"""Loading, training and export of Wan2.1 1.3B and 14B as published, by names and shapes alone; no weight is read."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from published import DITS, VAE, names_sha256, never_read, shapes_in, shapes_of, write_published, write_shards
from torch import Tensor

from flowmask.launch.config import load_job
from flowmask.launch.jobs import TrainJob
from flowmask.launch.plan.model import architecture, trained_module
from flowmask.launch.plan.one_pass import Shape
from flowmask.launch.plan.train import GpuSpeed, plan_training
from flowmask.models.dit import PATCH_KEY
from flowmask.models.lora import frozen_part, named_parameters, write_adapter
from flowmask.models.vae import LatentStats
from flowmask.models.weights import flowrvs_write
from flowmask.models.weights.flowrvs import reference_order
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.objectives import objective_named
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.weights import load_dit, load_mask_decoder
from flowmask.trainer.run.start import starting_module

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SIZES = {"1.3B": (825, 1_418_996_800), "14B": (1095, 14_288_491_584)}  # keys; parameters with 16 channels
TRAININGS = ("train_mevis", "train_mevis_lora", "train_mask_decoder", "train_light_mask_decoder")
NamedShapes = Mapping[str, tuple[int, ...]]


@pytest.fixture(scope="module", params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def wan(size: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / f"Wan2.1-T2V-{size}-Diffusers", size)


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test of this file may use the memory of real weights."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    never_read(monkeypatch)
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3 << 20  # KiB


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def wide(size: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the DiT that also takes the video."""
    known = shapes_of("transformer", size)
    return {**known, PATCH_KEY: (known[PATCH_KEY][0], 32, 1, 2, 2)}


def job_of(name: str, wan: Path, *changes: str) -> TrainJob:
    return load_job(CONFIGS / f"{name}.yaml", TrainJob, [f"model.wan={wan}", *changes])


def test_every_part_loads_and_the_dit_is_widened(wan: Path, size: str) -> None:
    keys, parameters = SIZES[size]
    folder = WanFolder(wan)
    shards = len(list((wan / "transformer").glob("*.safetensors")))
    assert shards == 2 if size == "1.3B" else shards > 2
    plain = folder.transformer(video_injection=False, dtype=torch.bfloat16)
    injected = folder.transformer(video_injection=True, dtype=torch.bfloat16)
    assert shapes(plain.state_dict()) == shapes_of("transformer", size) and len(plain.state_dict()) == keys
    assert shapes(injected.state_dict()) == wide(size)
    assert sum(tensor.numel() for tensor in plain.parameters()) == parameters
    assert {tensor.dtype for tensor in injected.parameters()} == {torch.bfloat16}
    vae, text, stored = folder.vae(), folder.text_encoder(torch.bfloat16), shapes_of("text_encoder")
    assert len(vae.state_dict()) == 194 and shapes(vae.state_dict()) == shapes_of("vae")
    assert len(stored) == 242 and stored.items() <= shapes(text.model.state_dict()).items()
    assert folder.latent_stats() == LatentStats.from_lists(VAE["latents_mean"], VAE["latents_std"])


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_starts_from_the_parameters_that_its_plan_counts(name: str, wan: Path, size: str) -> None:
    job = job_of(name, wan)
    objective = objective_named(job.objective, model=job.model, stats=None)
    module, _ = starting_module(job, objective, settings=objective.settings(), resumed=False)
    planned = trained_module(job, architecture(wan))
    described = [
        {key: (tuple(one.shape), one.requires_grad) for key, one in named_parameters(each)}
        for each in (module, planned)
    ]
    assert described[0] == described[1]
    if name == "train_mevis":
        assert {key: shape for key, (shape, _) in described[0].items()} == wide(size)
    if name == "train_mevis_lora":
        kept = {key: shape for key, (shape, _) in described[0].items() if ".lora_" not in key}
        assert kept == wide(size)


def held_by_ranks(name: str, wan: Path, *, ranks: str, stage: int) -> list[list[tuple[str, int, int]]]:
    """The pieces [name, start, elements] of some ranks of eight, by the real engine on fake tensors."""
    program = [str(ROOT / "tests" / "support" / "fake_ranks.py"), str(CONFIGS / f"{name}.yaml"), str(wan), ranks]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, *program, f"train.zero_stage={stage}"]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found: list[list[tuple[str, int, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_first_and_the_last_of_eight_ranks_hold_an_eighth_each(size: str, wan: Path) -> None:
    if size != "1.3B":
        pytest.skip("the long form has all sizes")
    known = {name: math.prod(shape) for name, shape in wide(size).items()}
    first, last = held_by_ranks("train_mevis", wan, ranks="0,7", stage=2)
    for rank in (first, last):
        assert all(begin + held <= known[name] for name, begin, held in rank)
        assert sum(held for _, _, held in rank) == sum(known.values()) // 8
    assert {name for name, _, _ in first}.isdisjoint(name for name, _, _ in last)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["train_mevis", "train_mevis_lora"])
def test_the_pieces_of_eight_ranks_are_every_trained_element_once(name: str, stage: int, wan: Path) -> None:
    module = trained_module(job_of(name, wan), architecture(wan))
    known = {key: one.numel() for key, one in named_parameters(module) if one.requires_grad}
    ends = dict.fromkeys(known, 0)
    ranks = held_by_ranks(name, wan, ranks="0,1,2,3,4,5,6,7", stage=stage)
    for key, begin, held in sorted(piece for rank in ranks for piece in rank):
        assert ends[key] == begin
        ends[key] += held
    assert ends == known


def test_a_plan_of_the_folder_is_the_one_that_is_made_without_it(wan: Path, size: str) -> None:
    speed, clip = GpuSpeed(100.0, 0.5, "test"), Shape(17, 480, 832)
    here, there = (
        plan_training(job_of("train_mevis", path), speed=speed, clip=clip) for path in (wan, Path("none") / wan.name)
    )
    assert here.parameters == SIZES[size][1] + 16 * 4 * DITS[size]["num_attention_heads"] * 128
    assert (here.settings, here.worlds, here.flop_per_example) == (there.settings, there.worlds, there.flop_per_example)
    assert not any(wan.name in note for note in here.notes) and any(wan.name in note for note in there.notes)


@pytest.fixture
def trained(size: str, tmp_path: Path) -> Path:
    """An export of a DiT that takes the video, and of its mask decoder."""
    decoder = {name: shape for name, shape in shapes_of("vae").items() if name.startswith(("decoder.", "post_"))}
    last = decoder["decoder.conv_out.weight"]
    decoder |= {"decoder.conv_out.weight": (1, *last[1:]), "decoder.conv_out.bias": (1,)}
    for part, held in (("transformer", wide(size)), ("mask_decoder", decoder)):
        (tmp_path / "trained" / part).mkdir(parents=True)
        write_shards(tmp_path / "trained" / part, "diffusion_pytorch_model", held)
    return tmp_path / "trained"


def test_an_export_of_any_format_has_every_tensor(
    trained: Path, wan: Path, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(str(trained), format="diffusers", out=tmp_path / "diffusers", wan=wan).path
    assert shapes(load_dit(str(out)).state_dict) == wide(size)
    assert len(list((out / "transformer").glob("*.safetensors"))) > 1
    assert json.loads((out / "transformer" / "config.json").read_text())["in_channels"] == 32
    known = shapes(load_mask_decoder(str(trained)).state_dict)
    assert shapes(load_mask_decoder(str(out)).state_dict) == known
    joined = shapes_in(out / "mask_decoder" / "diffusion_pytorch_model.safetensors")
    assert len(joined) == 194 and known.items() < joined.items()
    one = export(str(trained), format="safetensors", out=tmp_path / "one.safetensors").path
    assert shapes_in(one) == wide(size)
    written: list[Any] = []
    monkeypatch.setattr(flowrvs_write.torch, "save", lambda content, file: written.append(content))
    export(str(trained), format="flowrvs", out=tmp_path / "one.pth", wan=wan)
    content, known = written[0], wide(size)
    assert shapes(content["model"]) == known
    averaged = [tuple(tensor.shape) for tensor in content["ema_model"]["shadow_params"]]
    assert averaged == [known[name] for name in reference_order(known)]


def test_adapters_merge_into_the_whole_dit(wan: Path, size: str, tmp_path: Path) -> None:
    job = job_of("train_mevis_lora", wan)
    assert job.lora is not None
    module = trained_module(job, architecture(wan))
    trained = {name: one.detach() for name, one in named_parameters(module) if one.requires_grad}
    base = dict(WanFolder(wan).transformer(video_injection=True).named_parameters())
    write_adapter(tmp_path / "adapter", trained, job.lora)
    told: dict[str, Any] = {"lora": job.lora.model_dump(mode="json"), "video_injection": True}
    told["frozen"] = {"parameters": 0, "sha256": names_sha256(frozen_part(base, trained))}
    (tmp_path / "adapter" / "flowmask.json").write_text(json.dumps(told))
    assert shapes(load_dit(str(tmp_path / "adapter"), wan=wan).state_dict) == wide(size)
    out = export(str(tmp_path / "adapter"), format="lora", out=tmp_path / "again", wan=wan).path
    written = [shapes_in(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "adapter")]
    assert written[0] == written[1] and len(written[0]) == len(trained)
