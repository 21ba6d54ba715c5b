"""The memory of a rank in `flowmask plan` is that of two real ranks, at every ZeRO stage, in bf16 and fp32."""

from pathlib import Path
from typing import Any

import pytest
from plan_ranks import BUCKET, LATENT, job_of

from flowmask.launch.plan.memory import EIGHT_BIT_MOMENTS_BYTES, FP32_MOMENTS_BYTES, Setting, device_memory, host_memory
from flowmask.launch.plan.model import architecture, trained_module
from flowmask.launch.plan.one_pass import Shape, batch_bytes, micro_batch_pass
from flowmask.models.weights.tiny_wan import write_tiny_wan

SUPPORT = Path(__file__).parents[2] / "support"
SHAPE = Shape(4 * LATENT[0] - 3, 8 * LATENT[1], 8 * LATENT[2])
RECOMPUTE = ("none", "selective", "full", "none")
CASES: list[dict[str, Any]] = [
    {
        "precision": precision,
        "zero_stage": stage,
        "offload_optimizer": offload,
        "activation_checkpointing": RECOMPUTE[stage],
    }
    for precision in ("bf16", "fp32")
    for offload in (False, True)
    for stage in range(4)
    if stage or not offload
]
CASES += [{"zero_stage": stage, "sequence_parallel": 2} for stage in (0, 2)]
CASES += [{"zero_stage": 2, "optimizer": "adamw8bit"}]
FP32 = [number for number, case in enumerate(CASES) if case.get("precision") == "fp32"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "wan"
    write_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module")
def in_bf16(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, int]]:
    numbers = [number for number in range(len(CASES)) if number not in FP32]
    return measured_by_ranks(wan, tmp_path_factory.mktemp("ranks"), numbers)


@pytest.fixture(scope="module")
def in_fp32(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, int]]:
    return measured_by_ranks(wan, tmp_path_factory.mktemp("ranks"), FP32)


def measured_by_ranks(wan: Path, folder: Path, numbers: list[int]) -> dict[int, dict[str, int]]:
    """The memory of the first of two real ranks, by the number of the case."""
    from workers import run_ranks

    arguments = {"wan": str(wan), "cases": [CASES[number] for number in numbers]}
    ranks = run_ranks(2, SUPPORT / "plan_ranks.py", "measure", folder=folder, timeout_s=500, arguments=arguments)
    return dict(zip(numbers, ranks[0], strict=True))


@pytest.fixture
def measured(request: pytest.FixtureRequest, number: int) -> dict[int, dict[str, int]]:
    return request.getfixturevalue("in_fp32" if number in FP32 else "in_bf16")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=" ".join(map(str, case.values())), marks=[pytest.mark.long] if number in FP32 else [])
        for number, case in enumerate(CASES)
    ],
)
def test_a_rank_holds_what_the_plan_says(wan: Path, measured: dict[int, dict[str, int]], number: int) -> None:
    job = job_of(wan, CASES[number])
    shapes = architecture(wan)
    sizes = [parameter.numel() for parameter in trained_module(job, shapes).parameters()]
    recompute = job.train.activation_checkpointing
    cost = micro_batch_pass(job, shapes, SHAPE, recompute=recompute, like_a_gpu=False)
    eight = job.train.optimizer == "adamw8bit"
    setting = Setting(
        job.train.zero_stage,
        job.train.precision,
        job.train.offload_optimizer,
        ranks=2,
        moments_bytes=EIGHT_BIT_MOMENTS_BYTES if eight else FP32_MOMENTS_BYTES,
    )
    batch = 2 * (batch_bytes(job, SHAPE, text_dim=64) + 4 * 16 * LATENT[0] * LATENT[1] * LATENT[2])  # with the noise
    device = device_memory(
        setting,
        parameters=sum(sizes),
        activations=cost.peak_bytes,
        batch_bytes=batch,
        largest=max(sizes),
        bucket=BUCKET,
        prefetch=BUCKET,
        gpu=False,
    )
    hosted = host_memory(setting, parameters=sum(sizes))  # on a CPU, host and device memory are the same
    host = hosted.offloaded
    found = measured[number]
    between = device.states + host + (device.buffers if job.train.zero_stage == 3 else 0)  # some weights stay gathered
    assert found["peak"] == pytest.approx(device.working + host, rel=0.1)
    assert found["held"] == pytest.approx(between, rel=0.1)
    if not job.train.offload_optimizer:
        waiting = hosted.start if setting.effective_stage and setting.precision == "bf16" else 0
        assert found["start"] == pytest.approx(device.start + waiting, rel=0.1)
