"""Euler sampling: both recorded schedules, latents and first velocities. The shift is applied once."""

import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowmask.models.dit import velocity
from flowmask.models.flow import euler, euler_timesteps, integrate
from flowmask.models.vae import normalise
from parity.core import Check, ParitySet, names_are, near, same
from parity.dit_case import recorded_dit
from parity.flow_loss_case import latent_stats

SHIFT = 3.0
INPUTS = ("video_latent_mean", "encoder_hidden_states")

# The public scheduler config of Wan2.1-T2V-1.3B-Diffusers; FlowMatchEuler does not know its `flow_shift`.
WAN_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}


@functools.cache
def euler_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(dict(WAN_SCHEDULER))


def schedule(kind: str, steps: int) -> tuple[Tensor, Tensor]:
    """`mevis` is our schedule; `demo` is that of diffusers' scheduler with Wan's config and no other argument."""
    if kind == "mevis":
        return euler_timesteps(steps, SHIFT)
    assert kind == "demo", f"unknown schedule {kind}"
    scheduler = euler_scheduler()
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.clone(), scheduler.sigmas.clone()


def sampler_checks(data: ParitySet) -> Iterator[Check]:
    io, record = data.tensors("sampler/io.safetensors"), data.record("sampler/schedules.json")
    video = functools.cache(lambda: normalise(latent_stats(data), io["video_latent_mean"]))
    dit = functools.cache(lambda: recorded_dit(data, "dit_dvi"))

    @functools.cache
    def sampled(kind: str, steps: int) -> tuple[Tensor, Tensor]:
        velocities: list[Tensor] = []

        def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
            text = io["encoder_hidden_states"]
            velocities.append(velocity(dit(), x_t=x_t, video_latent=video(), timestep=timestep, text=text))
            return velocities[-1]

        with torch.no_grad():
            if kind == "mevis":
                return euler(predict, video(), steps=steps, shift=SHIFT), velocities[0]
            timesteps, sigmas = schedule(kind, steps)
            return integrate(predict, video(), timesteps=timesteps, sigmas=sigmas), velocities[0]

    found = [re.fullmatch(r"(\w+)\.n(\d+)\.(timesteps|sigmas|final|v_first)", name) for name in io]
    runs = sorted({(match[1], int(match[2])) for match in found if match})
    assert {kind for kind, _ in runs} == {"mevis", "demo"}, f"recorded runs: {runs}"
    wanted = [f"{kind}.n{n}.{part}" for kind, n in runs for part in ("timesteps", "sigmas", "final")]
    wanted += [f"mevis.n{n}.v_first" for kind, n in runs if kind == "mevis"]
    optional = [f"demo.n{n}.v_first" for kind, n in runs if kind == "demo" and f"demo.n{n}.v_first" in io]
    yield from names_are(io, (*INPUTS, "x0", *wanted, *optional))
    yield Check("x0", lambda: near(video(), io["x0"], abs=2e-6))
    for name in (*wanted, *optional):
        kind, n, part = name.split(".")
        steps = int(n[1:])
        if part in ("timesteps", "sigmas"):
            place, tolerance = (0, 1e-3) if part == "timesteps" else (1, 1e-6)
            yield Check(
                name, lambda k=kind, s=steps, p=place, t=tolerance, n=name: near(schedule(k, s)[p], io[n], abs=t)
            )
            continue
        place = 0 if part == "final" else 1
        yield Check(name, lambda k=kind, s=steps, p=place, n=name: near(sampled(k, s)[p], io[n], abs=5e-5, rel=2e-4))
    yield from _schedule_checks(record)


def _schedule_checks(record: dict[str, Any]) -> Iterator[Check]:
    assert record["schedules"].keys() == {"mevis", "demo"} and all(record["schedules"].values())
    for kind, entries in record["schedules"].items():
        for n, entry in entries.items():
            yield Check(
                f"schedules.{kind}.{n}.timesteps",
                lambda k=kind, n=n, e=entry: near(schedule(k, int(n))[0], e["timesteps"], abs=1e-3),
            )
            yield Check(
                f"schedules.{kind}.{n}.sigmas",
                lambda k=kind, n=n, e=entry: near(schedule(k, int(n))[1], e["sigmas"], abs=1e-6),
            )
    used = record["scheduler_config_used"]

    def config() -> dict[str, Any]:
        return {key: value for key, value in euler_scheduler().config.items() if not key.startswith("_")}

    yield Check("scheduler_config_used names", lambda: same(sorted(config()), sorted(used)))
    for key, value in used.items():
        yield Check(f"scheduler_config_used.{key}", lambda k=key, v=value: same(config()[k], v))
