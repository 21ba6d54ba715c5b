"""`flowmask plan`: formulas against measurements, plans without weights or caches, and errors of one line."""

import json
import math
import re
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from flowmask.launch.check import preflight
from flowmask.launch.cli.main import app
from flowmask.launch.config import load_job
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob
from flowmask.launch.plan.cache import plan_cache
from flowmask.launch.plan.encoders import Encoders, share_of_peak
from flowmask.launch.plan.evaluate import plan_evaluation
from flowmask.launch.plan.memory import CONTEXT_BYTES, FRAGMENTATION, STATE_BYTES, Setting, device_memory
from flowmask.launch.plan.model import architecture, parameters
from flowmask.launch.plan.one_pass import Shape, micro_batch_pass
from flowmask.launch.plan.show import _nothing, show
from flowmask.launch.plan.train import GpuSpeed, plan_training
from flowmask.models.dit import Recompute
from flowmask.models.errors import ConfigError
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.state.saving import Checkpoints

CONFIGS = Path(__file__).parents[3] / "configs"
SPEED = GpuSpeed(100.0, 0.5, "test")
runner = CliRunner()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lab")
    runs.make_lab(folder)
    return folder


def job_of(lab: Path, changes: dict[str, Any] | None = None, *, out: Path = Path("run")) -> TrainJob:
    tree = runs.run_config(lab, out, changes).model_dump(mode="json")
    return TrainJob.model_validate({**tree, "launch": {}})


def test_the_published_size_is_as_it_was_measured_with_a_counter() -> None:
    job = load_job(CONFIGS / "train_mevis.yaml", TrainJob)
    found = plan_training(job, speed=SPEED)
    assert found.parameters == pytest.approx(1.419e9, rel=1e-3)
    assert found.tokens == 7800
    assert found.flop_per_example == pytest.approx(93.5e12, rel=1e-3)
    recomputed = next(plan for plan in found.settings if plan.setting.recompute == "full")
    assert recomputed.slowdown == pytest.approx(4 / 3, rel=0.1)
    encoders = Encoders(architecture(job.model.wan))
    shape = Shape(17, 480, 832)
    assert encoders.encode(shape, dtype="float32").flop == pytest.approx(34.9e12, rel=0.01)
    assert encoders.decode(shape).flop == pytest.approx(58.6e12, rel=0.01)
    assert encoders.text_bytes("bfloat16") == pytest.approx(11.36e9, rel=0.01)
    assert any("Wan2.1-T2V-1.3B-Diffusers does not exist" in note for note in found.notes)


def test_a_run_plans_what_its_checkpoint_and_its_cache_hold(lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs.start(lab, out, {"train.steps": 3}) == 0
    found = plan_training(job_of(lab), speed=SPEED)
    files = list((out / "checkpoints").glob("step_00000003/*.safetensors"))
    assert sum(path.stat().st_size for path in files) == pytest.approx(found.checkpoint_bytes, rel=0.1)
    dit = WanFolder(lab / "wan").transformer(video_injection=True)
    assert found.parameters == found.trained == parameters(dit)
    manifest = json.loads((lab / "cache" / "manifest.json").read_text())
    assert set(found.shapes) == {
        f"{bucket['frames']}x{bucket['height']}x{bucket['width']}" for bucket in manifest["buckets"]
    }
    assert math.isclose(sum(found.shapes.values()), 1)
    assert found.epochs == 10 * 4 / 8
    assert found.notes == []


def test_a_plan_says_steps_and_epochs_whichever_are_given_as_far_as_the_cache_is_there(lab: Path) -> None:
    by_epochs = {"train.steps": None, "train.epochs": 5}
    found = [plan_training(job_of(lab, changes), speed=SPEED) for changes in ({}, by_epochs)]
    assert [(plan.steps, plan.epochs) for plan in found] == [(10, 5.0), (10, 5.0)]
    assert found[0].worlds == found[1].worlds
    gone = [
        plan_training(job_of(lab, {"data.cache": "gone", **changes}), speed=SPEED, clip=Shape(5, 32, 48))
        for changes in ({}, by_epochs)
    ]
    assert [(plan.steps, plan.epochs) for plan in gone] == [(10, None), (None, 5)]
    assert gone[1].worlds[0].hours is None and "the number of steps of 5 epochs is unknown" in " ".join(gone[1].notes)
    said_of_each = ("10 steps, 5.00 epochs",) * 2 + ("10 steps, epochs unknown", "steps unknown, 5.00 epochs")
    for plan, said in zip((*found, *gone), said_of_each, strict=True):
        console = Console(width=200, record=True, file=StringIO())
        show(plan, console)
        assert said in console.export_text()


def test_a_cache_takes_the_bytes_that_were_planned(lab: Path) -> None:
    job = CacheJob.model_validate(runs.cache_settings(lab))
    found = plan_cache(job, speed=SPEED)
    manifest = json.loads((lab / "cache" / "manifest.json").read_text())
    assert (found.clips, found.examples) == (manifest["clips"], manifest["examples"])
    built = sum(path.stat().st_size for path in (lab / "cache").rglob("*") if path.is_file())
    assert found.total_bytes == pytest.approx(built, rel=0.1)


@pytest.mark.parametrize("shape", [Shape(5, 32, 48), Shape(9, 64, 32)])
def test_the_encoders_do_the_work_that_was_planned(lab: Path, shape: Shape) -> None:
    from flowmask.models.vae import encode_moments

    vae, encoders = WanFolder(lab / "wan").vae(), Encoders(architecture(lab / "wan"))
    pixels = torch.zeros(1, 3, shape.frames, shape.height, shape.width)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encode_moments(vae, pixels)
    assert encoders.encode(shape, dtype="float32").flop == pytest.approx(counter.get_total_flops(), rel=0.1)
    text = WanFolder(lab / "wan").text_encoder()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text("two birds near the water", max_tokens=64)
    tokens = text.token_count("two birds near the water")
    assert encoders.text_flop(tokens) == pytest.approx(counter.get_total_flops(), rel=0.1)
    together = encoders.embed(sentences=3, tokens=tokens, dtype="float32")
    assert together.flop == pytest.approx(encoders.text_flop(3 * tokens, sentences=3), rel=0.1)
    assert together.peak_bytes > 3 * tokens * text.model.config.d_model * 4


def test_cost_is_linear_in_the_depth_that_is_not_run(lab: Path) -> None:
    shapes = architecture(lab / "wan")
    deep = architecture(lab / "wan")
    deep.dit_config["num_layers"] = 6
    job, shape = job_of(lab), Shape(5, 32, 48)
    assert shapes.dit_config["num_layers"] == 1
    kinds: tuple[Recompute, ...] = ("none", "selective", "full")
    for recompute in kinds:
        found = micro_batch_pass(job, deep, shape, recompute=recompute)
        whole = micro_batch_pass(job, deep, shape, recompute=recompute, every_layer=True)
        assert found == whole


def test_more_sharding_never_takes_more_memory_and_one_process_has_nothing_to_shard() -> None:
    sizes = [device_memory(Setting(2, ranks=ranks), parameters=1e9, activations=1e9).peak for ranks in (2, 4, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)
    alone = [device_memory(Setting(stage), parameters=1e9, activations=0).states for stage in range(4)]
    assert len(set(alone)) == 1


@pytest.mark.parametrize(
    "name",
    [
        *("cache_mevis", "cache_refcoco", "evaluate_mevis"),
        *("train_mask_decoder", "train_light_mask_decoder", "train_mevis", "train_mixed"),
    ],
)
def test_a_config_has_a_plan_without_weights_or_data(name: str) -> None:
    done = runner.invoke(app, ["plan", str(CONFIGS / f"{name}.yaml"), "--json", "--gpu", "A100"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert "does not exist" in " ".join(found["notes"]) and found["speed"]["tflops"] == 312


@pytest.mark.parametrize("kind", ["cache", "dit", "evaluate"])
def test_the_text_of_a_plan_says_the_assumed_speed_and_what_does_not_exist(kind: str) -> None:
    shown = runner.invoke(app, ["plan", str(CONFIGS / "demo" / f"{kind}.yaml"), "--tflops", "100", "--mfu", "0.3"])
    assert "100 TFLOP/s x MFU 0.3" in " ".join(shown.output.split())
    assert "does not exist" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "Z80"], "--gpu is 'Z80'; known: "),
        (["--mfu", "40"], "--mfu is 40; it must be above 0 and at most 1"),
        (["--node-mtbf-h", "0"], "--node-mtbf-h is 0; it must be from 0.001 to 1e9 hours"),
        (["--restart-min", "nan"], "--restart-min is nan; it must be from 0 to 1e6 minutes"),
        (["--tflops", "-1"], "--tflops is -1; it must be above 0"),
        (["--clip", "16x480x832"], "--clip is 16x480x832; frames must be 4k + 1"),
        (["--clip", "large"], "--clip is 'large'; it must be FRAMESxHEIGHTxWIDTH"),
        (["train.stepz=1"], "unknown key train.stepz; did you mean train.steps?"),
        (["train.global_batch=7"], "train.global_batch is 7; it must be a multiple of"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str) -> None:
    done = runner.invoke(app, ["plan", str(CONFIGS / "train_mevis.yaml"), *arguments])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_a_light_mask_decoder_is_planned_as_such_and_its_share_of_the_vaes_work_is_said(tmp_path: Path) -> None:
    training = runner.invoke(app, ["plan", str(CONFIGS / "train_light_mask_decoder.yaml")])
    assert "light: 0.028 % of the VAE decoder's FLOPs" in training.output
    (tmp_path / "mask_decoder").mkdir()
    told = {"objective": "light_mask_decoder", "light_decoder": {"width": 64, "depth": 1}}
    (tmp_path / "flowmask.json").write_text(json.dumps(told))
    own, light = (
        plan_evaluation(load_job(CONFIGS / "evaluate_mevis.yaml", EvaluateJob, [f"mask_decoder={named}"]), speed=SPEED)
        for named in ("vae", tmp_path)
    )
    assert own.decoder_share is None and light.decoder_share == pytest.approx(0.00028, rel=0.02)
    assert light.device_bytes < own.device_bytes
    vae = Encoders(architecture(Path("none"))).decode(Shape(9, 480, 832)).flop * 17 / 9
    assert own.flop - light.flop == pytest.approx(2 * vae, rel=0.01)  # fp32 as TF32: half the peak rate


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_the_mask_decoder_trains_on_80_gb_at_the_published_size_and_in_bf16_on_24(precision: str) -> None:
    job = load_job(CONFIGS / "train_mask_decoder.yaml", TrainJob, [f"train.precision={precision}"])
    found = plan_training(job, speed=SPEED, clip=Shape(17, 480, 832))
    peak = {plan.setting.recompute: plan.device.peak / 1e9 for plan in found.settings}
    assert found.chosen.setting.recompute == "selective"  # as in the bundled config
    assert peak["full"] < peak["selective"] < 80 < peak["none"]
    assert all(world.device_bytes < 80e9 for world in found.worlds)  # also on a single GPU
    on_80, on_24 = found.fits(80), found.fits(24)
    assert on_80 is not None and on_80.setting.recompute == "selective" and on_80.slowdown == 1
    assert (on_24 is not None) == (precision == "bf16") and (on_24 is None or on_24.setting.recompute == "full")


@pytest.mark.parametrize(
    ("name", "changes", "gb", "said"),
    [
        ("train_mask_decoder", ["train.micro_batch=4"], 40, r"^Set train.micro_batch=2$"),
        ("train_mask_decoder", ["train.precision=fp32"], 24, r"clip.short_side=\d+ clip.long_side=\d+$"),
        ("train_mask_decoder", ["train.micro_batch=8"], 12, r"clip.long_side=\d+ and set train.micro_batch=1$"),
        ("train_mevis", ["model.wan=weights/Wan-14B"], 40, r"^Its weights alone"),
        ("train_mevis", ["train.micro_batch=16", "train.global_batch=16"], 24, r"^Set train.micro_batch=8$"),
    ],
)
@pytest.mark.long
def test_what_a_plan_advises_where_nothing_fits_can_be_done_and_then_fits(
    name: str, changes: list[str], gb: int, said: str
) -> None:
    config, alone = CONFIGS / f"{name}.yaml", [*changes, "launch.processes_per_node=1"]
    found = plan_training(load_job(config, TrainJob, alone), speed=SPEED, clip=Shape(17, 480, 832))
    assert found.fits(gb) is None
    advice = _nothing(found, gb).partition("). ")[2]
    assert re.search(said, advice), advice
    height, width = (int(side) for side in re.findall(r"_side=(\d+)", advice) or (480, 832))
    advised = re.findall(r"train\.micro_batch=\d+", advice)
    assert found.micro_batch > 1 or not advised
    if not advice.startswith("Its"):
        again = load_job(config, TrainJob, [*alone, *advised])
        assert plan_training(again, speed=SPEED, clip=Shape(17, height, width)).fits(gb) is not None


@dataclass(frozen=True)
class Found:
    """All parts of a plan that advice needs: 2 GB of weights, and the bytes of activations."""

    micro_batch: int
    activations: float
    start: float = 1e9
    largest: str = "17x480x832"

    @property
    def settings(self) -> list[Any]:
        peak = CONTEXT_BYTES + (1 + FRAGMENTATION) * (2e9 + self.activations)
        device = SimpleNamespace(peak=peak, activations=self.activations, start=self.start)
        return [SimpleNamespace(device=device, setting=Setting(1, recompute="full"))]


def test_advice_follows_from_what_does_not_fit_and_a_micro_batch_of_one_is_never_made_smaller() -> None:
    for micro in (1, 2, 6):
        for activations in (30e9, 60e9, 600e9, 6e15):
            found: Any = Found(micro, activations)
            advice = _nothing(found, 24).partition("). ")[2]
            if "micro_batch" in advice:
                (fewer,) = re.findall(r"micro_batch=(\d+)", advice)
                assert int(fewer) < micro and micro % int(fewer) == 0
            if sides := [int(side) for side in re.findall(r"_side=(\d+)", advice)]:
                assert 0 < sides[0] < 480 and all(side % 32 == 0 for side in sides)
                left = activations / micro * sides[0] * sides[1] / (480 * 832)
                assert CONTEXT_BYTES + (1 + FRAGMENTATION) * (2e9 + left) <= 24e9
    whole: Any = Found(1, 1e9, start=30e9)
    assert "Its weights alone are too large: " in _nothing(whole, 24)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 4}, {"objective.kind": "mask_decoder"}, {"evaluate.every_steps": 2, "evaluate.examples": 1}],
)
def test_the_disk_that_a_run_takes_is_what_was_planned_and_what_is_asked_for_before_it(
    lab: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"train.steps": 3, "checkpoint.every_steps": 1, "checkpoint.milestone_every_steps": 2, **changes}
    job = job_of(lab, often, out=tmp_path / "run")
    planned = plan_training(job, speed=SPEED)
    most, real = [0], Checkpoints._publish

    def publish(*args: Any) -> Any:
        folder = tmp_path / "run" / "checkpoints"
        most.append(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
        return real(*args)

    monkeypatch.setattr(Checkpoints, "_publish", publish)
    assert runs.start(lab, tmp_path / "run", often) == 0
    (file,) = (tmp_path / "run" / "checkpoints" / "step_00000003").glob("*.safetensors")
    tensors = load_file(file)
    assert sum(t.nbytes for name, t in tensors.items() if not name.startswith("rng|")) == planned.checkpoint_bytes
    around = file.stat().st_size - planned.checkpoint_bytes  # tensor names and a generator's state
    assert 0.5 * planned.disk_bytes < max(most) <= planned.disk_bytes + 9 * around
    asked = next(found for found in preflight.examine(job) if found.what == "disk")
    assert f"take {planned.disk_bytes / 1e9:.3g} GB" in asked.said


def test_fp32_is_as_fast_as_tf32_is_allowed_and_null_allows_it_to_convolutions() -> None:
    shares = {
        (tf32, products): share_of_peak("float32", tf32=tf32, products=products)
        for tf32 in (True, None, False)
        for products in (True, False)
    }
    fast = [key for key, share in shares.items() if share == 1 / 2]
    assert fast == [(True, True), (True, False), (None, False)] and set(shares.values()) == {1 / 2, 1 / 16}
    assert share_of_peak("bfloat16", tf32=False, products=True) == 1


@pytest.mark.parametrize(("tf32", "slower"), [("true", 2), ("null", 16)])
def test_a_plan_counts_it(lab: Path, tf32: str, slower: float) -> None:
    in_fp32 = {"train.precision": "fp32", "train.tf32": {"true": True, "null": None}[tf32]}
    plans = [plan_training(job_of(lab, changes), speed=SPEED) for changes in ({}, in_fp32)]
    assert plans[1].worlds[0].hours == pytest.approx(slower * plans[0].worlds[0].hours)
    settings = runs.cache_settings(lab)
    settings["cache"] = {**settings["cache"], "tf32": in_fp32["train.tf32"]}
    cache = plan_cache(CacheJob.model_validate(settings), speed=SPEED)
    seconds = (2 * cache.video_flop + slower * cache.text_flop) / SPEED.flop_per_s
    assert cache.hours * cache.workers == pytest.approx(seconds / 3600)


def test_what_fits_is_the_fastest_that_fits() -> None:
    job = load_job(CONFIGS / "train_mevis.yaml", TrainJob)
    found = plan_training(job, speed=SPEED)
    for gb in (24, 40, 80):
        best = found.fits(gb)
        assert best is not None and best.device.peak <= gb * 1e9
        faster = [p for p in found.settings if p.slowdown < best.slowdown and not p.setting.offload]
        assert all(p.device.peak > gb * 1e9 for p in faster)
    assert found.fits(1) is None
    steps = {world.world_size: world.step_s for world in found.worlds}
    assert steps[1] == pytest.approx(8 * steps[8])
    assert steps[8] == pytest.approx(found.flop_per_step / (8 * 50e12))
    assert found.disk_bytes >= found.checkpoint_bytes == STATE_BYTES * found.trained
