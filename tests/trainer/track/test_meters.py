"""Rates, windows of steps, memory and peak rates."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmask.trainer.track.meters import Throughput, Work, memory, peak_tflops, summarise


def test_a_steps_rates_are_its_work_over_its_time() -> None:
    meter = Throughput(global_batch=8, world_size=4, peak_tflops=100.0, work=lambda step: Work(1000 * step, 20e12))
    assert meter.rates(3, seconds=0.5, waited_s=0.1) == pytest.approx(
        {
            "step_s": 0.5,
            "examples_per_s": 16,
            "data_wait_pct": 20,
            "tokens_per_s": 6000,
            "model_tflop_per_s": 40,
            "mfu_pct": 10,
        }
    )


def test_what_is_not_known_is_not_reported() -> None:
    assert Throughput(4).rates(1, seconds=1, waited_s=9) == {"step_s": 1, "examples_per_s": 4, "data_wait_pct": 100}
    no_peak = Throughput(4, work=lambda step: Work(1, 1.0)).rates(1, seconds=1, waited_s=0)
    assert "mfu_pct" not in no_peak and "model_tflop_per_s" in no_peak


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50))
def test_a_windows_rate_is_its_examples_over_its_time(seconds: list[float]) -> None:
    meter = Throughput(7)
    rows = [meter.rates(1, seconds=s, waited_s=s / 4) for s in seconds]
    summary = summarise(rows)
    assert summary["examples_per_s"] == pytest.approx(7 * len(seconds) / math.fsum(seconds))
    assert summary["data_wait_pct"] == pytest.approx(25)
    assert summary["step_s_p90"] == np.percentile(seconds, 90)
    assert min(seconds) <= summary["step_s_p50"] <= summary["step_s_p99"] <= max(seconds)


def test_a_window_leaves_out_what_is_no_number_and_keeps_the_last_state() -> None:
    rows = [
        {"step": 1, "loss": 1.0, "loss_at_video": 4.0, "lr": 0.1, "batch": 5, "time": 9.0},
        {"step": 2, "loss": None, "lr": 0.2, "skipped": True, "grad_norm": None},
        {"step": 3, "loss": 3.0, "lr": 0.3, "grad_norm": math.nan},
    ]
    assert summarise(rows) == {"loss": 2.0, "loss_at_video": 4.0, "lr": 0.3}


ODD = st.one_of(st.none(), st.booleans(), st.text(max_size=2), st.floats(), st.integers(-(10**400), 10**400))


@given(st.lists(st.dictionaries(st.sampled_from(["step_s", "examples_per_s", "loss", "lr"]), ODD), max_size=4))
def test_whatever_rows_hold_their_summary_is_finite(rows: list[dict[str, object]]) -> None:
    assert all(math.isfinite(value) for value in summarise(rows).values())


def test_memory_is_this_process() -> None:
    before = memory()["host_memory_gib"]
    block = np.ones(2**26)  # 512 MiB, touched
    assert memory()["host_memory_gib"] - before == pytest.approx(block.nbytes / 2**30, abs=0.1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA RTX A4000", None),  # not an A40
        ("Tesla K80", None),
        (None, None),
    ],
)
def test_a_gpus_peak_is_found_by_its_name(name: str | None, peak: float | None) -> None:
    assert peak_tflops(name) == peak
