"""`flowmask plan`: formulas against what is measured, plans without weights or caches, and errors of one line."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from flowmask.launch.check import preflight
from flowmask.launch.cli.main import app
from flowmask.launch.config import load_job
from flowmask.launch.jobs import CacheJob, TrainJob
from flowmask.launch.plan.cache import plan_cache
from flowmask.launch.plan.encoders import Encoders
from flowmask.launch.plan.memory import STATE_BYTES, Setting, device_memory
from flowmask.launch.plan.model import architecture, parameters
from flowmask.launch.plan.one_pass import Shape, micro_batch_pass
from flowmask.launch.plan.show import _keys, _nothing
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


def job_of(lab: Path, **changes: Any) -> TrainJob:
    tree = runs.run_config(lab, lab / "run").model_dump(mode="json")
    return TrainJob.model_validate({**tree, **changes})


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
    assert any("Wan2.1-T2V-1.3B-Diffusers is not there" in note for note in found.notes)


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
    ["cache_mevis", "cache_refcoco", "evaluate_mevis", "train_mask_decoder", "train_mevis", "train_mixed", "demo/dit"],
)
def test_a_config_has_a_plan_without_weights_or_data(name: str) -> None:
    done = runner.invoke(app, ["plan", str(CONFIGS / f"{name}.yaml"), "--json", "--gpu", "A100"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["notes"] and found["speed"]["tflops"] == 312
    shown = runner.invoke(app, ["plan", str(CONFIGS / f"{name}.yaml"), "--tflops", "100", "--mfu", "0.3"])
    assert "100 TFLOP/s x MFU 0.3" in " ".join(shown.output.split())
    assert "is not there" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "Z80"], "--gpu is 'Z80'; known: "),
        (["--mfu", "40"], "--mfu is 40; it is a fraction in (0, 1]"),
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


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_mask_decoder_trains_on_80_gb_at_the_published_size_and_in_bf16_on_24_gb(
    precision: str, ranks: int
) -> None:
    changes = [f"train.precision={precision}", f"launch.processes_per_node={ranks}"]
    job = load_job(CONFIGS / "train_mask_decoder.yaml", TrainJob, changes)
    found = plan_training(job, speed=SPEED, clip=Shape(17, 480, 832))
    peak = {setting.recompute: plan.device.peak / 1e9 for plan in found.settings for setting in [plan.setting]}
    assert found.chosen.setting.recompute == "selective"  # as the config that comes with FlowMask has it
    assert peak["full"] < peak["selective"] < 80 < peak["none"]
    on_80 = found.fits(80)
    assert on_80 is not None and on_80.setting.recompute == "selective" and on_80.slowdown == 1
    on_24 = found.fits(24)
    assert (on_24 is not None) == (precision == "bf16") and (on_24 is None or on_24.setting.recompute == "full")


def test_what_a_plan_advises_where_nothing_fits_can_be_done_and_then_fits() -> None:
    cases = [
        ("train_mask_decoder", ["train.micro_batch=8", "launch.processes_per_node=1"], 24, r"train.micro_batch=1$"),
        ("train_mask_decoder", ["train.precision=fp32"], 24, r"clip.short_side=\d+ clip.long_side=\d+$"),
        (
            "train_mask_decoder",
            ["train.micro_batch=8", "launch.processes_per_node=1"],
            10,
            r"and set train.micro_batch=1$",
        ),
        (
            "train_mevis",
            ["train.micro_batch=8", "launch.processes_per_node=1", "train.global_batch=8"],
            24,
            r"micro_batch",
        ),
        ("train_mevis", ["model.wan=weights/Wan-14B", "launch.processes_per_node=1"], 80, r"^Its weights alone"),
    ]
    for name, changes, gb, said in cases:
        config = CONFIGS / f"{name}.yaml"
        found = plan_training(load_job(config, TrainJob, changes), speed=SPEED, clip=Shape(17, 480, 832))
        if (best := found.fits(gb)) is not None:
            assert f"train.activation_checkpointing={best.setting.recompute}" in _keys(best)
            continue
        advice = _nothing(found, gb).rpartition(" (")[2].partition("). ")[2]
        assert re.search(said, advice), (name, changes, advice)
        assert "micro_batch" not in advice or found.micro_batch > 1
        if advice.startswith("Its"):
            continue
        clip = [int(side) for side in re.findall(r"_side=(\d+)", advice)] or [480, 832]
        advised = re.findall(r"train\.micro_batch=\d+", advice)
        again = load_job(config, TrainJob, [*changes, *advised])
        assert plan_training(again, speed=SPEED, clip=Shape(17, clip[0], clip[1])).fits(gb) is not None, advice


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora.rank": 4}, {"objective.kind": "mask_decoder"}, {"evaluate.every_steps": 2, "evaluate.examples": 1}],
)
def test_the_disk_that_a_run_takes_is_what_was_planned_and_what_is_asked_for_before_it(
    lab: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    often = {"train.steps": 5, "checkpoint.every_steps": 1, "checkpoint.milestone_every_steps": 2, **changes}
    tree = runs.run_config(lab, tmp_path / "run", often).model_dump(mode="json")
    job = TrainJob.model_validate({**tree, "launch": {}})
    planned = plan_training(job, speed=SPEED)
    most, real = [0], Checkpoints._publish

    def publish(*args: Any) -> Any:
        folder = tmp_path / "run" / "checkpoints"
        most.append(sum(path.stat().st_size for path in folder.rglob("*.safetensors")))
        return real(*args)

    monkeypatch.setattr(Checkpoints, "_publish", publish)
    assert runs.start(lab, tmp_path / "run", often) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step_00000005").glob("*.safetensors"))
    assert written == pytest.approx(planned.checkpoint_bytes, rel=0.15)  # and the names in the file's header
    assert 0.5 * planned.disk_bytes < max(most) < 1.15 * planned.disk_bytes
    asked = next(found for found in preflight.examine(job) if found.what == "disk")
    assert f"take {planned.disk_bytes / 1e9:.3g} GB" in asked.said


@pytest.mark.parametrize(("tf32", "slower"), [(True, 2.0), (None, 16.0), (False, 16.0)])
def test_time_in_fp32_follows_what_the_gpu_is_allowed(tf32: bool | None, slower: float) -> None:
    hours = []
    for changes in ([], ["train.precision=fp32", f"train.tf32={'null' if tf32 is None else tf32}"]):
        job = load_job(CONFIGS / "train_mevis.yaml", TrainJob, changes)
        hours.append(plan_training(job, speed=SPEED, clip=Shape(5, 64, 64)).worlds[0].hours)
    assert hours[1] == pytest.approx(slower * hours[0])


def test_convolutions_are_in_tf32_unless_that_is_switched_off() -> None:
    hours = {}
    for tf32 in ("true", "null", "false"):
        job = load_job(CONFIGS / "cache_mevis.yaml", CacheJob, [f"cache.tf32={tf32}"])
        found = plan_cache(job, speed=SPEED)
        hours[tf32] = found.hours
        video, text = ((flop / SPEED.flop_per_s / 3600) for flop in (found.video_flop, found.text_flop))
        by_hand = {"true": 2 * (video + text), "null": 2 * video + 16 * text, "false": 16 * (video + text)}
        assert found.hours * found.workers == pytest.approx(by_hand[tf32])
    assert hours["true"] < hours["null"] < hours["false"]


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
