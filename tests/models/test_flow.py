"""The flow's mathematics: path, posterior, timestep law and Euler steps."""

import pytest
import torch
from trials import SEED, TRIALS

from flowmask.models.flow import (
    draw_timestep,
    euler,
    euler_timesteps,
    integrate,
    interpolate,
    path_time,
    sample_posterior,
)

SHAPE = (2, 16, 3, 4, 6)


def test_the_path_runs_from_the_mask_at_0_to_the_video_at_1_with_constant_velocity() -> None:
    video, mask = torch.randn(2, *SHAPE)
    for t, end in ((0.0, mask), (1.0, video)):
        x_t, velocity = interpolate(video, mask, torch.full((2,), t))
        assert torch.equal(x_t, end) and torch.equal(velocity, video - mask)
    mixed, _ = interpolate(video, mask, torch.tensor([0.25, 1.0]))
    assert torch.allclose(mixed[0], 0.25 * video[0] + 0.75 * mask[0]) and torch.equal(mixed[1], video[1])


def test_path_time_is_a_thousandth_of_the_timestep() -> None:
    assert torch.allclose(path_time(torch.tensor([1000, 437, 1])), torch.tensor([1.0, 0.437, 0.001]))


def test_a_posterior_sample_has_the_posteriors_moments_and_a_clamped_logvar() -> None:
    eps = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    sample = sample_posterior(torch.full_like(eps, 3.0), torch.full_like(eps, 2.0).log() * 2, eps)
    assert abs(sample.mean() - 3) < 0.03 and abs(sample.std() - 2) < 0.03
    low = sample_posterior(torch.zeros(1), torch.tensor([-1000.0]), torch.ones(1))
    high = sample_posterior(torch.zeros(1), torch.tensor([1000.0]), torch.ones(1))
    assert torch.allclose(low, torch.tensor(-15.0).exp()) and torch.allclose(high, torch.tensor(10.0).exp())


def check_timestep_law(draws: int, probability: float, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    special, u = torch.rand(2, draws, generator=source, dtype=torch.float64)
    timestep = draw_timestep(special, u, boundary_probability=probability)
    below = timestep[timestep < 1000]
    assert timestep.dtype == torch.int64
    error = 5 * (probability * (1 - probability) / draws) ** 0.5
    assert abs((timestep == 1000).double().mean() - probability) <= error
    if probability < 1:
        counts = torch.bincount(below, minlength=1000)[1:].double()
        expected = torch.full((999,), 0.001, dtype=torch.float64)
        expected[0] = 0.002
        chi = ((counts - expected * len(below)) ** 2 / (expected * len(below))).sum()
        assert below.min() == 1 and below.max() == 999
        assert abs(chi - 998) < 6 * (2 * 998) ** 0.5, chi


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_a_timestep_is_1000_with_the_probability_else_uniform_below(probability: float) -> None:
    check_timestep_law(200_000, probability, seed=0)


@pytest.mark.long
def test_the_timestep_law_holds_for_any_seed() -> None:
    for trial in range(20 * TRIALS):
        check_timestep_law(1_000_000, 0.5, seed=SEED + trial)


def test_the_edges_of_the_uniform_draw_stay_in_1_to_999() -> None:
    edges = torch.tensor([0.0, 0.000999, 0.001, 0.002, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    drawn = draw_timestep(torch.ones(6), edges, boundary_probability=0.5)
    assert drawn.tolist() == [1, 1, 1, 2, 999, 999]
    assert draw_timestep(torch.ones(1), torch.tensor([1 - 2**-24]), boundary_probability=0.5).item() == 999


def test_published_schedules_come_out_with_the_shift_applied_once() -> None:
    timesteps, sigmas = euler_timesteps(4, 3.0)
    assert timesteps.tolist() == [1000, 900, 750, 501]
    assert torch.allclose(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.501, 0.0]))
    assert euler_timesteps(1, 3.0)[0].tolist() == [1000]
    assert torch.allclose(euler_timesteps(4, 1.0)[0], torch.tensor([1000.0, 750.0, 500.0, 251.0]), atol=1)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_schedules_fall_from_1_to_0(steps: int, shift: float) -> None:
    timesteps, sigmas = euler_timesteps(steps, shift)
    assert len(timesteps) == steps and len(sigmas) == steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() <= 0).all()


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_lands_on_the_mask_when_the_velocity_is_exact(steps: int) -> None:
    video, mask = torch.randn(2, *SHAPE)
    landed = euler(lambda x, t: video - mask, video, steps=steps, shift=3.0)
    assert torch.allclose(landed, mask, atol=1e-5)


def test_one_step_is_the_video_less_the_velocity_at_the_video() -> None:
    video, asked = torch.randn(SHAPE), []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append((x, t))
        return 2 * x

    assert torch.allclose(euler(velocity, video, steps=1, shift=3.0), -video)
    (x, timestep), *more = asked
    assert not more and torch.equal(x, video) and timestep.tolist() == [1000.0, 1000.0]


def test_integration_converges_with_the_steps() -> None:
    start = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = integrate(lambda x, t: x, start, timesteps=1000 * sigmas[:-1], sigmas=sigmas)
        errors.append(abs(end.item() - torch.tensor(-1.0, dtype=torch.float64).exp().item()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)
