"""Decides which steps are skipped: spikes of the gradient norm and of the loss.

The limits use logarithms: median and median absolute deviation over the last taken steps, from numbers
that are the same on every rank. The limits are known before a step, so a spike never reaches the optimizer.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from flowmask.trainer.config import GuardConfig

_MAD_TO_SIGMA = 1.4826  # for a normal distribution
_SMALLEST_SIGMA = 0.1  # of a logarithm: in a very even training, a doubled norm is no spike


class SpikeGuard:
    """The recent steps of one run and the limits that follow from them; `state` is saved in checkpoints."""

    def __init__(self, config: GuardConfig, *, state: Mapping[str, Any] | None = None) -> None:
        """state: of an earlier start; with a shorter `guard.window_steps` only its newest values are kept."""
        past = state or {}
        self._config = config
        self._norms: deque[float] = deque(past.get("grad_norms", ()), maxlen=config.window_steps)
        self._losses: deque[float] = deque(past.get("losses", ()), maxlen=config.window_steps)

    @property
    def grad_norm_limit(self) -> float:
        """The largest gradient norm (before clipping) that the next step may have."""
        return self._limit(self._norms, self._config.grad_norm_spike)

    @property
    def loss_limit(self) -> float:
        """The largest loss that the next step may have."""
        return self._limit(self._losses, self._config.loss_spike)

    def _limit(self, past: Sequence[float], deviations: float | None) -> float:
        if deviations is None or len(past) < self._config.judge_after_steps:
            return math.inf
        return spike_limit(past, deviations=deviations)

    def took(self, *, loss: float, grad_norm: float) -> None:
        """Record a taken step. Skipped ones are not recorded, because they would raise the limits."""
        self._norms.append(grad_norm)
        self._losses.append(loss)

    def state(self) -> dict[str, Any]:
        """The state with which a resumed run decides as if it had never stopped."""
        return {"grad_norms": list(self._norms), "losses": list(self._losses)}


def spike_limit(past: Sequence[float], *, deviations: float) -> float:
    """Median times e^(deviations x sigma), sigma the robust standard deviation of the logarithms."""
    logs = [math.log(max(value, 1e-300)) for value in past]
    middle = median(logs)
    sigma = max(_SMALLEST_SIGMA, _MAD_TO_SIGMA * median(abs(value - middle) for value in logs))
    return math.exp(min(middle + deviations * sigma, 700.0))
