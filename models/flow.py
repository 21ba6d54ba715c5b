"""The flow between a mask (t=0) and its video, or noise (t=1): path, posterior sample, timestep law, Euler sampler.

Pure functions: tensors in, tensors out; no config, device, logger or global generator. The caller passes all random
numbers, so that tests can check a distribution without the source of its numbers.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
LOGVAR_RANGE = (-30.0, 20.0)
_SMALLEST_T = 1e-5
_START_SEED = 0


def interpolate(video: Tensor, mask: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point on the straight path from the mask (t=0) to the video (t=1), and the velocity of that path.

    video:   [B 16 f h w] norm    mask: [B 16 f h w] raw    t: [B]
    returns: x_t = t video + (1-t) mask, velocity = video - mask
    """
    t = t.view(-1, *[1] * (video.dim() - 1))
    return t * video + (1 - t) * mask, video - mask


def velocity_to(end: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at `x_t` of the straight path that ends at `end` at t=0; x_t, end: [B ...], t: [B], above 0."""
    return (x_t - end) / t.view(-1, *[1] * (x_t.dim() - 1))


def start_noise(shape: Sequence[int]) -> Tensor:
    """The start of sampling from noise: standard normal float32 of a latent's shape [16 f h w], always the same."""
    drawn = np.random.Generator(np.random.Philox(_START_SEED)).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(drawn)


def path_time(timestep: Tensor) -> Tensor:
    """t [B] float32 of integer timesteps [B]: timestep/1000, kept above 0, where the path has no direction."""
    return (timestep.float() / TRAIN_TIMESTEPS).clamp(_SMALLEST_T, 1.0)


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Sample of the VAE posterior, raw [B 16 f h w].

    mean: [B 16 f h w] raw    logvar: of the same shape, clamped first as the VAE does    eps: of it, standard normal
    """
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * eps


def draw_timestep(u_special: Tensor, u: Tensor, *, boundary_probability: float) -> Tensor:
    """Training timestep of each example: 1000 with `boundary_probability`, else over 1..999 (FlowRVS' boundary bias).

    u_special, u: uniform in [0, 1), of any equal shapes. Returns int64 of that shape. 1 is twice as likely as
    any other value below 1000, because floor(1000 u) = 0 is moved to 1; `u` never gives 1000.
    """
    rest = (u.double() * TRAIN_TIMESTEPS).floor().clamp(1, TRAIN_TIMESTEPS - 1).long()
    return torch.where(u_special < boundary_probability, TRAIN_TIMESTEPS, rest)


def euler_timesteps(steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """Timesteps [steps] and sigmas [steps + 1] (the last is 0), float32, from the video down to the mask.

    The shift is applied once, here; `FlowMatchEulerDiscreteScheduler` would ignore Wan's `flow_shift`.
    """
    s = np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1]
    timesteps = np.round(TRAIN_TIMESTEPS * shift * s / (1 + (shift - 1) * s))
    sigmas = np.append(timesteps / TRAIN_TIMESTEPS, 0.0)
    return torch.from_numpy(timesteps).float(), torch.from_numpy(sigmas).float()


def integrate(
    velocity_fn: Callable[[Tensor, Tensor], Tensor], start: Tensor, *, timesteps: Tensor, sigmas: Tensor
) -> Tensor:
    """Euler steps along given times: z <- z + (sigma[k+1] - sigma[k]) velocity(z, timestep[k]).

    start: [B 16 f h w], the point at t=1    timesteps: [steps]    sigmas: [steps + 1], as `euler_timesteps` gives them
    velocity_fn: (x_t [B 16 f h w], timestep [B] float32) -> velocity [B 16 f h w]
    returns: [B 16 f h w] at t=0, in the space in which the path ends
    """
    z = start
    for timestep, step in zip(timesteps.tolist(), sigmas.diff().tolist(), strict=True):
        here = torch.full(z.shape[:1], timestep, dtype=timesteps.dtype, device=z.device)  # a copy would block
        z = z + step * velocity_fn(z, here)
    return z


def euler(velocity_fn: Callable[[Tensor, Tensor], Tensor], start: Tensor, *, steps: int, shift: float) -> Tensor:
    """Carry a start [B 16 f h w] (video latent, norm; or noise) to the mask latent of the same shape, raw.

    No noise is added on the way. One step gives start - velocity.
    """
    timesteps, sigmas = euler_timesteps(steps, shift)
    return integrate(velocity_fn, start, timesteps=timesteps, sigmas=sigmas)
