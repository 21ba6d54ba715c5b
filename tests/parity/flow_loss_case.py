"""Flow matching as trained: path, target, loss, gradients, clipping, three AdamW steps, EMA, mask pixels."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import resize_masks
from flowmask.data_pipeline.read.loader import Batch
from flowmask.models.config import ModelConfig
from flowmask.models.dit import velocity
from flowmask.models.flow import interpolate, path_time, sample_posterior
from flowmask.models.vae import LatentStats, mask_to_signed, normalise
from flowmask.trainer.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from flowmask.trainer.step.ema import decay_of_update
from parity.core import Check, ParitySet, names_are, near, same
from parity.dit_case import TOLERANCE, recorded_dit

EMA_DECAY = 0.9999
INPUTS = ("video_posterior_mean", "video_posterior_logvar", "eps", "mask_latent", "timestep", "encoder_hidden_states")
POINTS = ("x0", "x_t", "u_t", "v_pred")
GRADIENT_ROUNDING = 2e-6  # part of a tensor's largest gradient: float32 sums in another order may differ by this


@dataclass
class Trained:
    """Our own run over the recorded steps, by step and parameter name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    clipped: list[dict[str, Tensor]] = field(default_factory=list)
    params: list[dict[str, Tensor]] = field(default_factory=list)
    averages: list[dict[str, Tensor]] = field(default_factory=list)
    before: dict[str, Tensor] = field(default_factory=dict)


def _batch(step: Mapping[str, Tensor]) -> Batch:
    none = torch.zeros(len(step["timestep"]), dtype=torch.int64)
    return Batch(
        step=0,
        example_ids=none,
        positions=none,
        epochs=none,
        keys=none.tolist(),
        digest=0,
        video_mean=step["video_posterior_mean"],
        video_logvar=step["video_posterior_logvar"],
        mask_mean=step["mask_latent"],
        text=step["encoder_hidden_states"],
        draws={"timestep": step["timestep"], "eps": step["eps"]},
    )


def train(dit: Any, steps: list[dict[str, Tensor]], stats: LatentStats, meta: Mapping[str, Any]) -> Trained:
    """The recorded optimisation with the trainer's own objective and EMA law."""
    objective = FlowMatching(FlowMatchingConfig(), ModelConfig(wan=Path("unused")), stats)
    optimizer = torch.optim.AdamW(
        dit.parameters(), lr=meta["lr"], betas=tuple(meta["betas"]), eps=meta["eps"], weight_decay=meta["weight_decay"]
    )
    named = dict(dit.named_parameters())
    run = Trained(before={name: p.detach().clone() for name, p in named.items()})
    shadow = {name: p.detach().clone() for name, p in named.items()}
    for number, step in enumerate(steps, start=1):
        optimizer.zero_grad()
        loss, _ = objective.loss(dit, _batch(step))
        loss.backward()
        run.losses.append(loss.item())
        run.gradients.append({name: p.grad.clone() for name, p in named.items()})
        run.norms.append(torch.nn.utils.clip_grad_norm_(dit.parameters(), meta["clip_max_norm"]).item())
        run.clipped.append({name: p.grad.clone() for name, p in named.items()})
        optimizer.step()
        weight = 1 - decay_of_update(number, decay=EMA_DECAY)
        shadow = {name: shadow[name] - weight * (shadow[name] - p.detach()) for name, p in named.items()}
        run.params.append({name: p.detach().clone() for name, p in named.items()})
        run.averages.append(shadow)
    return run


def adam_spread(run: Trained, name: str, upto: int, meta: Mapping[str, Any]) -> NDArray[np.float64]:
    """The largest difference of each element when its gradients are rounded differently.

    Adam follows the sign of a gradient near zero, so a few elements can differ by up to twice the learning
    rate; for all others the difference is almost zero.
    """
    gradients = [step[name].double().numpy() for step in run.clipped[: upto + 1]]
    reference = _adam(gradients, run.before[name].double().numpy(), meta)
    spread = np.zeros_like(reference)
    for signs in itertools.product((-1.0, 1.0), repeat=len(gradients)):
        moved = [g + s * GRADIENT_ROUNDING * np.abs(g).max() for g, s in zip(gradients, signs)]
        spread = np.maximum(spread, np.abs(_adam(moved, run.before[name].double().numpy(), meta) - reference))
    return spread


def _adam(
    gradients: list[NDArray[np.float64]], value: NDArray[np.float64], meta: Mapping[str, Any]
) -> NDArray[np.float64]:
    (beta1, beta2), lr = meta["betas"], meta["lr"]
    first = second = np.zeros_like(value)
    for number, gradient in enumerate(gradients, start=1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        value = value * (1 - lr * meta["weight_decay"])
        scale = np.sqrt(second / (1 - beta2**number)) + meta["eps"]
        value = value - lr * first / (1 - beta1**number) / scale
    return value


def after_steps(got: Tensor, want: Tensor, spread: NDArray[np.float64]) -> None:
    """The README's rule for the whole tensor, and 1e-5 for each element whose gradient has a certain sign."""
    difference = (got - want).abs()
    assert difference.mean() < 1e-6, f"mean difference {difference.mean():.3g}"
    fraction = (difference > 1e-5).float().mean()
    assert fraction < 0.005, f"{fraction:.2%} of the elements are off by more than 1e-5"
    near(got, want, abs=1e-5 + spread)


def _path(step: Mapping[str, Tensor], stats: LatentStats, dit: Any, **wrong: Any) -> dict[str, Tensor]:
    raw = sample_posterior(step["video_posterior_mean"], step["video_posterior_logvar"], step["eps"])
    video = normalise(stats, raw)
    mask = normalise(stats, step["mask_latent"]) if wrong.get("normalised") else step["mask_latent"]
    x_t, target = interpolate(video, mask, path_time(step["timestep"]))
    first, second = (video, x_t) if wrong.get("swapped") else (x_t, video)
    with torch.no_grad():
        predicted = velocity(
            dit, x_t=first, video_latent=second, timestep=step["timestep"], text=step["encoder_hidden_states"]
        )
    return {"x0": video, "x_t": x_t, "u_t": target, "v_pred": predicted}


def _mistakes(step: Mapping[str, Tensor], stats: LatentStats, dit: Any) -> dict[str, float]:
    """The losses of three classic mistakes; the record proves that our code makes none of them."""

    def loss(sign: float = 1.0, **wrong: Any) -> float:
        points = _path(step, stats, dit, **wrong)
        return (points["v_pred"] - sign * points["u_t"]).square().mean().item()

    return {
        "x1_normalised": loss(normalised=True),
        "concat_order_swapped": loss(swapped=True),
        "target_sign_flipped": loss(sign=-1.0),
    }


def latent_stats(data: ParitySet) -> LatentStats:
    io = data.tensors("flow_loss/io.safetensors")
    return LatentStats.from_lists(io["latents_mean"].tolist(), io["latents_std"].tolist())


def flow_loss_checks(data: ParitySet) -> Iterator[Check]:
    io, meta = data.tensors("flow_loss/io.safetensors"), data.record("flow_loss/meta.json")
    count = len(meta["loss"])
    steps = [{name: io[f"step{i}.{name}"] for name in INPUTS} for i in range(count)]
    stats = latent_stats(data)
    fresh = functools.cache(lambda: recorded_dit(data, "dit_dvi"))
    run = functools.cache(lambda: train(recorded_dit(data, "dit_dvi"), steps, stats, meta))
    path = functools.cache(lambda: _path(steps[0], stats, fresh()))

    inputs = [f"step{i}.{name}" for i in range(count) for name in INPUTS]
    points = [f"step0.{name}" for name in POINTS]
    yield from names_are(io, ("latents_mean", "latents_std", *inputs, *points))
    for name in POINTS:
        tolerance = TOLERANCE if name == "v_pred" else {"abs": 2e-6}
        yield Check(f"step0.{name}", lambda n=name, t=tolerance: near(path()[n], io[f"step0.{n}"], **t))
    yield from _meta_checks(meta, steps, run, lambda: _mistakes(steps[0], stats, fresh()))
    yield from _tensor_checks(data.tensors("flow_loss/grads.safetensors"), meta, count, run)
    yield from _pixel_checks(data.tensors("flow_loss/mask_pixels.safetensors"))


def _meta_checks(meta: Mapping[str, Any], steps: list[dict[str, Tensor]], run: Any, mistakes: Any) -> Iterator[Check]:
    for i, step in enumerate(steps):
        yield Check(f"loss[{i}]", lambda i=i: near(run().losses[i], meta["loss"][i], rel=1e-5))
        yield Check(f"grad_norm[{i}]", lambda i=i: near(run().norms[i], meta["grad_norm_before_clip"][i], rel=1e-4))
        yield Check(
            f"ema_decay[{i}]",
            lambda i=i: near(decay_of_update(i + 1, decay=EMA_DECAY), meta["ema_decay"][i], abs=1e-12),
        )
        yield Check(f"timesteps[{i}]", lambda i=i, step=step: same(step["timestep"].tolist(), meta["timesteps"][i]))
    for key in ("loss", "grad_norm_before_clip", "ema_decay", "timesteps"):
        yield Check(f"{key} of each step", lambda key=key: same(len(meta[key]), len(steps)))
    table = meta["ema_decay_schedule"]
    assert table and meta["negative_controls_step0"].keys() == {
        "x1_normalised",
        "concat_order_swapped",
        "target_sign_flipped",
    }
    for number, decay in table.items():
        yield Check(
            f"ema_decay_schedule.{number}",
            lambda n=number, d=decay: near(decay_of_update(int(n), decay=EMA_DECAY), d, abs=1e-12),
        )
    for name, loss in meta["negative_controls_step0"].items():
        yield Check(f"negative_control.{name}", lambda n=name, v=loss: near(mistakes()[n], v, rel=1e-5))


def _tensor_checks(grads: Mapping[str, Tensor], meta: Mapping[str, Any], count: int, run: Any) -> Iterator[Check]:
    kinds = ("step0.grad", "step0.clipped", f"after_step{count - 1}.param", f"after_step{count - 1}.ema")
    assert meta["named_parameters"], "no parameter is recorded"
    yield from names_are(grads, [f"{kind}.{name}" for kind in kinds for name in meta["named_parameters"]])

    def check(key: str) -> None:
        match = re.fullmatch(r"(?:after_)?step(\d+)\.(grad|clipped|param|ema)\.(.+)", key)
        assert match, key
        step, kind, name = int(match[1]), match[2], match[3]
        ours = {"grad": "gradients", "clipped": "clipped", "param": "params", "ema": "averages"}[kind]
        got, want = getattr(run(), ours)[step][name], grads[key]
        if kind in ("grad", "clipped"):
            near(got, want, abs=1e-3 * want.abs().max().item())
        else:
            after_steps(got, want, adam_spread(run(), name, step, meta))

    for key in grads:
        yield Check(key, functools.partial(check, key))


def _pixel_checks(pixels: Mapping[str, Tensor]) -> Iterator[Check]:
    masks, want = pixels["masks"].bool(), pixels["vae_input"]

    def ours() -> Tensor:
        size = (want.shape[-1], want.shape[-2])
        resized = torch.stack([torch.from_numpy(resize_masks(clip.numpy(), size=size)) for clip in masks])
        return mask_to_signed(resized)

    yield from names_are(pixels, ("masks", "vae_input"))
    yield Check("mask_pixels.vae_input", lambda: same(ours()[:, :1], want))
    yield Check("mask_pixels three equal channels", lambda: same(ours(), ours()[:, :1].expand(-1, 3, -1, -1, -1)))
