"""LoRA runs are trained, resumed and moved like any run; only adapters have state; a hash identifies the base."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from runs import losses, run_config, run_group, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from workers import run_ranks

from flowmask.models.config import LoraConfig, SamplerConfig
from flowmask.models.dit import velocity
from flowmask.models.errors import CheckpointError, ConfigError, UserError, WeightsError
from flowmask.models.lora import add_lora, named_parameters
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import load_segmenter
from flowmask.trainer.predict.weights import load_adapter, load_dit, part_of
from flowmask.trainer.state.checkpoint import read_full
from flowmask.trainer.state.steps import complete

STAGES, SHORT = (0, 1, 2, 3), (1, 3)
EACH_STAGE = [stage if stage in SHORT else pytest.param(stage, marks=pytest.mark.long) for stage in STAGES]
STEPS = 8
LORA: dict[str, Any] = {"lora": {"rank": 3, "alpha": 6}, "train.steps": STEPS, "train.lr": 1e-2}
FORMATS = {"diffusers": "", "flowrvs": ".pth", "safetensors": ".safetensors"}


def overrides(stage: int) -> dict[str, Any]:
    return LORA | {"train.zero_stage": stage, "train.micro_batch": 1}


@pytest.fixture(scope="module")
def trials(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_trials(lab, tmp_path_factory.mktemp("lora"), SHORT)


@pytest.fixture(scope="module")
def other_trials(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_trials(lab, tmp_path_factory.mktemp("lora"), [stage for stage in STAGES if stage not in SHORT])


@pytest.fixture
def trial(request: pytest.FixtureRequest, stage: int) -> Path:
    """The folder of the runs with this ZeRO stage."""
    return request.getfixturevalue("trials" if stage in SHORT else "other_trials")


def run_trials(lab: Path, folder: Path, stages: Sequence[int]) -> Path:
    """`one`: one process. Two processes at every ZeRO stage N: `never_N`, `stopped_N` (resumed), `moved_N` (to one)."""
    assert start(lab, folder / "one", overrides(0)) == 0
    jobs: list[dict[str, Any]] = []
    for stage in stages:
        job = {"lab": str(lab), "overrides": overrides(stage) | {"checkpoint.keep_last": 9}}
        stopped = job | {"out": str(folder / f"stopped_{stage}")}
        jobs += [job | {"out": str(folder / f"never_{stage}")}]
        jobs += [stopped | {"signal_rank": 1, "code": REQUEUE_EXIT_CODE}, stopped]
    run_group(jobs, folder=folder / "logs", timeout_s=540)
    for stage in stages:
        moved = shutil.copytree(folder / f"stopped_{stage}", folder / f"moved_{stage}", symlinks=True)
        for later in ("step_00000006", "step_00000008"):
            shutil.rmtree(moved / "checkpoints" / later)
        assert start(lab, moved, overrides(stage) | {"train.micro_batch": 2}) == 0
    return folder


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_ranks_and_zero_stage_do_not_change_the_training_of_adapters(trial: Path, stage: int) -> None:
    one, two = losses(trial / "one"), losses(trial / f"never_{stage}")
    assert two == pytest.approx(one, rel=5e-3) and len(two) == STEPS
    assert max(abs(a - b) for a, b in pairwise(one)) > 0.05  # the loss changes


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_a_resumed_run_of_adapters_equals_one_never_stopped_to_the_bit(trial: Path, stage: int) -> None:
    never, stopped = trial / f"never_{stage}", trial / f"stopped_{stage}"
    assert "continuing from step_00000005" in (stopped / "log.txt").read_text()
    assert losses(stopped) == losses(never)
    for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
        ends = [read_full(complete(run / "checkpoints")[0], kind=kind) for run in (never, stopped)]
        assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_two_processes_hand_their_adapters_to_one(trial: Path, stage: int) -> None:
    moved = trial / f"moved_{stage}"
    assert "continuing from step_00000005" in (moved / "log.txt").read_text()
    assert losses(moved) == pytest.approx(losses(trial / f"never_{stage}"), rel=5e-3)


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(trials: Path, lab: Path) -> None:
    dit: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    add_lora(dit, LoraConfig(rank=3, alpha=6), seed=0)
    trained = {name: list(p.shape) for name, p in named_parameters(dit) if p.requires_grad}
    for stage in SHORT:
        newest = complete(trials / f"never_{stage}" / "checkpoints")[0]
        document = json.loads((newest / "state.json").read_text())
        assert document["parameters"] == trained and "peft" not in json.dumps(sorted(trained))
        stored = 0
        for name in document["files"]:
            with safe_open(newest / name, "pt") as file:
                keys = [key for key in file.keys() if not key.startswith("rng|")]  # noqa: SIM118
                stored += sum(file.get_slice(key).get_shape()[0] for key in keys)
        assert stored == 4 * sum(torch.Size(shape).numel() for shape in trained.values())
        assert document["state"]["frozen"]["parameters"] == len(list(named_parameters(dit))) - len(trained)


def frozen_cost(*, lab: str) -> dict[str, Any]:
    """Run by every rank: the memory for frozen and for trained parameters, after two steps in bf16."""
    from scenarios import EMA_DECAY, ShardedEma, Velocity, micro_batches, settings, tiny_dit

    from flowmask.trainer.step.engine import Engine

    found: dict[str, Any] = {}
    for stage in STAGES:
        dit: Any = tiny_dit()
        dit.to(torch.float32)
        add_lora(dit, LoraConfig(rank=2, also_train=("patch_embedding",)), seed=0)
        before = {name: p.detach().clone() for name, p in named_parameters(dit) if not p.requires_grad}
        engine = Engine(dit, train=settings(stage=stage, precision="bf16"))
        ema = ShardedEma(engine, decay=EMA_DECAY)
        for step in range(2):
            assert not engine.step(Velocity(), micro_batches(step, micro=2)).skipped
            ema.update()
        state = [s for state in engine._optimizer.state.values() for s in state.values() if s.ndim]
        found[str(stage)] = {
            "trained": sum(torch.Size(shape).numel() for shape in engine.shapes.values()),
            "parts": len(engine.shapes),
            "moments": sum(tensor.numel() for tensor in state),
            "masters": sum(master.numel() for master in engine._flat_masters()),
            "shadow": sum(tensor.numel() for tensor in ema.shadow),
            **_frozen_now(dict(named_parameters(engine.module)), before, gathered=stage == 3),
        }
        engine.close()
    return found


def _frozen_now(parameters: Mapping[str, Any], before: Mapping[str, Tensor], *, gathered: bool) -> dict[str, Any]:
    import deepspeed

    frozen = {name: p for name, p in parameters.items() if name in before}
    with deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=gathered):
        same = all(torch.equal(p.detach(), before[name].bfloat16()) for name, p in frozen.items())
    return {
        "dtypes": {str(p.dtype) for p in frozen.values()},
        "gradients": sum(p.grad is not None for p in frozen.values()),
        "untouched": same and len(frozen) == len(before) > 10,
    }


def test_frozen_weights_have_no_master_moments_average_or_gradient_and_do_not_move(lab: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, Path(__file__), "frozen_cost", folder=tmp_path, arguments={"lab": str(lab)}, timeout_s=240)
    for stage, first in ranks[0].items():
        both = [found[stage] for found in ranks]
        share = 1 if stage == "0" else 2
        room = first["trained"] + 64 * first["parts"]  # padding of the flat buffers
        for found in both:
            assert found["masters"] <= room / share + 64 * first["parts"], stage
            assert found["moments"] == 2 * found["masters"]
            assert found["dtypes"] == {"torch.bfloat16"} and found["gradients"] == 0 and found["untouched"]
        assert sum(found["shadow"] for found in both) == first["trained"]


def unmerged(lab: Path, source: str, *, ema: bool = True) -> nn.Module:
    """The base with unmerged adapters, as the training computes it in fp32."""
    adapter = load_adapter(source, ema=ema)
    dit: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    add_lora(dit, adapter.config, seed=1)
    for name, parameter in named_parameters(dit):
        if parameter.requires_grad:
            parameter.data.copy_(adapter.trained[name])
    return dit


def whole(lab: Path, state: Mapping[str, Tensor]) -> nn.Module:
    dit: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    dit.load_state_dict(state)
    return dit


@torch.no_grad()
def answer(dit: Any) -> Tensor:
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 2, 16, 2, 4, 8, generator=source)
    text = torch.randn(2, 7, dit.config["text_dim"], generator=source)
    given = {"x_t": latents[0], "video_latent": latents[1], "timestep": torch.tensor([1000, 437])}
    return velocity(dit, **given, text=text)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() < 1e-5 * expected.norm())


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_merged_export_computes_what_base_and_adapters_compute(
    trials: Path, lab: Path, tmp_path: Path, format: str, ema: bool
) -> None:
    run = str(trials / "never_3")
    done = export(run, format=format, out=tmp_path / f"w{FORMATS[format]}", ema=ema)
    loaded = load_dit(str(done.path), ema=ema)
    assert loaded.sha256 == load_dit(run, ema=ema).sha256 == done.sha256
    expected = answer(unmerged(lab, run, ema=ema))
    base: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    assert close(answer(whole(lab, loaded.state_dict)), expected)
    assert (answer(base) - expected).norm() > 1e-3 * expected.norm()


def test_the_adapter_folder_is_pefts_and_a_source_of_weights(trials: Path, lab: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = str(trials / "never_1")
    folder = export(run, format="lora", out=tmp_path / "adapter").path
    assert {"adapter_config.json", "adapter_model.safetensors"} < {path.name for path in folder.iterdir()}
    base: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    expected = answer(unmerged(lab, run))
    assert close(answer(PeftModel.from_pretrained(base, str(folder))), expected)
    other: Any = WanFolder(lab / "wan").transformer(video_injection=True)
    other.load_lora_adapter(folder, prefix="base_model.model", weight_name="adapter_model.safetensors")
    assert close(answer(other), expected)
    again = load_dit(str(folder), wan=lab / "wan")
    assert again.sha256 == load_dit(run).sha256 and part_of(str(folder)).name == "dit"
    assert (
        export(str(folder), format="lora", out=tmp_path / "again").sha256
        == export(run, format="lora", out=tmp_path / "third").sha256
    )
    settings = json.loads((folder / "flowmask.json").read_text())
    assert settings["text_tokens"] == 256 and str(lab) not in json.dumps(settings)
    with pytest.raises(WeightsError, match=r"does not name its base; give model\.wan"):
        load_dit(str(folder))


def test_prediction_takes_a_lora_run_its_exports_and_its_adapters_alike(
    trials: Path, lab: Path, tmp_path: Path
) -> None:
    run = str(trials / "one")
    ours = load_segmenter(run, sampler=SamplerConfig())
    merged = export(run, format="diffusers", out=tmp_path / "merged").path
    adapters = export(run, format="lora", out=tmp_path / "lora").path
    for source in (merged, adapters):
        theirs = load_segmenter(str(source), sampler=SamplerConfig(), wan=lab / "wan")
        assert theirs.weights == ours.weights and theirs.box == ours.box


@pytest.fixture
def swapped(lab: Path, tmp_path: Path) -> tuple[Path, Callable[[], None]]:
    """A separate lab, and a function that changes one weight of its base."""
    own = tmp_path / "lab"
    own.mkdir()
    shutil.copytree(lab / "wan", own / "wan")
    (own / "cache").symlink_to(lab / "cache")

    def change() -> None:
        file = next((own / "wan" / "transformer").glob("*.safetensors"))
        state = load_file(file)
        state["proj_out.bias"][0] += 1e-3
        save_file(state, file)

    return own, change


def test_any_other_base_is_refused_in_one_line(swapped: tuple[Path, Callable[[], None]], tmp_path: Path) -> None:
    own, change = swapped
    run, short = tmp_path / "run", LORA | {"train.steps": 2}
    assert start(own, run, short) == 0
    folder = export(str(run), format="lora", out=tmp_path / "adapter").path
    change()
    attempts: list[Callable[[], Any]] = [
        lambda: start(own, run, LORA | {"train.steps": 3}),
        lambda: load_segmenter(str(run), sampler=SamplerConfig()),
        lambda: export(str(run), format="safetensors", out=tmp_path / "w.safetensors"),
        lambda: load_dit(str(folder), wan=own / "wan"),
        lambda: start(own, tmp_path / "other", {"train.steps": 1, "model.init": str(run)}),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=r"was trained on other frozen weights \(.*sha256") as refusal:
            attempt()
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "w.safetensors").exists()


def test_adapters_may_rest_on_weights_other_than_wans(trials: Path, lab: Path, tmp_path: Path) -> None:
    base = export(str(trials / "one"), format="safetensors", out=tmp_path / "base.safetensors").path
    run, init = tmp_path / "run", {"model.init": str(base), "train.precision": "fp32"}
    frozen_patch = {"lora": {"rank": 2, "also_train": []}}  # the base has learned the video already
    assert start(lab, run, LORA | init | frozen_patch | {"train.steps": 2}) == 0
    assert start(lab, run, LORA | init | frozen_patch | {"train.steps": 4}) == 0
    assert start(lab, tmp_path / "never", LORA | init | frozen_patch | {"train.steps": 4}) == 0
    assert losses(run) == losses(tmp_path / "never")
    start_loss = tmp_path / "whole"
    assert start(lab, start_loss, init | {"train.steps": 1}) == 0
    assert losses(start_loss)[0] == losses(run)[0]
    patch = "patch_embedding.weight"
    assert torch.equal(load_dit(str(run)).state_dict[patch], load_dit(str(base)).state_dict[patch])
    base.rename(tmp_path / "moved.safetensors")
    with pytest.raises(WeightsError, match=r"was trained on .*base\.safetensors, which does not exist"):
        load_dit(str(run))


def test_evaluation_while_training_sees_the_averaged_adapters(lab: Path, tmp_path: Path) -> None:
    common = {"train.precision": "fp32", "evaluate.every_steps": 3, "evaluate.examples": 2}
    quick = common | {"evaluate.jf_examples": 1, "train.lr": 1e-2, "checkpoint.every_steps": 100}
    assert start(lab, tmp_path / "lora", quick | {"lora": {"rank": 3}, "train.steps": 3}) == 0
    still = quick | {"train.steps": 1, "evaluate.every_steps": 1, "train.lr": 1e-12}
    assert start(lab, tmp_path / "whole", still | {"model.init": str(tmp_path / "lora")}) == 0
    seen, expected = (json.loads((tmp_path / name / "evaluations.jsonl").read_text()) for name in ("lora", "whole"))
    names = [name for name in expected if name.startswith("eval_loss")]
    assert len(names) > 3 and all(seen[n] == pytest.approx(expected[n], rel=1e-5) for n in names)


def test_recomputation_does_not_change_what_adapters_learn(lab: Path, trials: Path, tmp_path: Path) -> None:
    change = {"train.activation_checkpointing": True}
    assert start(lab, tmp_path / "run", overrides(0) | change) == 0
    assert losses(tmp_path / "run") == losses(trials / "one")


def test_what_a_lora_run_cannot_be_is_refused(lab: Path, trials: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"lora has nothing to adapt in the module of objective\.kind mask_decoder"
    ):
        run_config(lab, tmp_path, LORA | {"objective.kind": "mask_decoder"})
    with pytest.raises(CheckpointError, match=r"lora\.rank: 3 -> 4"):
        start(lab, trials / "one", overrides(0) | {"lora": {"rank": 4, "alpha": 6}})
    with pytest.raises(ConfigError, match=r"lora\.targets has 'to_x'"):
        start(lab, tmp_path / "run", LORA | {"lora": {"targets": ["to_x"]}})
    assert start(lab, tmp_path / "plain", {"train.steps": 1}) == 0
    with pytest.raises(WeightsError, match="has no LoRA adapters; export it in another format"):
        export(str(tmp_path / "plain"), format="lora", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
