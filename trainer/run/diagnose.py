"""Why a step was skipped, and the message about it: the first value that was not finite, or the exceeded limit.

An objective's loss stores flags on the device, which are read only if a step was skipped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowmask.data_pipeline.read.loader import Batch
from flowmask.models.errors import TrainingError
from flowmask.trainer import distributed
from flowmask.trainer.config import RunConfig
from flowmask.trainer.step.engine import StepResult

_INPUTS = {"video_mean": "latents", "video_logvar": "latents", "mask_mean": "latents", "text": "text"}
_PARTS = ("latents", "text", "noise", "prediction", "loss", "gradient")  # each is computed from those before it
_SPIKES = ("loss spike", "gradient norm spike")


@dataclass(frozen=True)
class Skip:
    """Why a step was skipped, and the examples that caused it; none: the whole batch."""

    reason: str
    examples: tuple[int, ...] = ()


def why_skipped(result: StepResult, batches: Sequence[Batch], *, loss_limit: float) -> Skip:
    """Why the step was skipped, given this rank's micro-batches. Collective; the same on every rank."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return Skip(_SPIKES[0] if result.loss > loss_limit else _SPIKES[1])
    found: dict[str, set[int]] = {"gradient" if math.isfinite(result.loss) else "loss": set()}
    for broken in distributed.gather_objects([pair for batch in batches for pair in not_finite(batch)]):
        for part, example in broken:
            found.setdefault(part, set()).add(example)
    first = next(part for part in _PARTS if part in found)
    return Skip(f"{first} not finite", tuple(sorted(found[first])))


def not_finite(batch: Batch) -> list[tuple[str, int]]:
    """(part, example) for every non-finite value in a micro-batch."""
    held = [(part, getattr(batch, name)) for name, part in _INPUTS.items()]
    flags = [(part, t.isfinite().flatten(1).all(1)) for part, t in held if t is not None]
    return [
        (part, example)
        for part, finite in (*flags, *batch.finite.items())
        for example, fine in zip(batch.example_ids.tolist(), finite.tolist(), strict=True)
        if not fine
    ]


def told(skips: Mapping[str, int]) -> str:
    """`3 steps skipped: 2 noise not finite, 1 gradient norm spike`."""
    total = sum(skips.values())
    if not total:
        return "no step skipped"
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skips.items(), key=lambda s: -s[1]))
    return f"{total} {'step' if total == 1 else 'steps'} skipped: {counts}"


def useless(config: RunConfig, skips: Mapping[str, int], *, updates: int, reason: str = "") -> TrainingError:
    """The error of a run that was stopped by the guard, or in which no step counted, with the next action.

    updates: the steps that counted; reason: of the last skip, else the most frequent one.
    """
    reason = reason or max(skips, key=lambda name: skips[name], default="")
    row = f"the last {config.guard.max_consecutive_skips} steps in a row; the last good weights are saved"
    kept = row if updates else "no step counted, so there are no new weights"
    return TrainingError(f"{config.out} stopped: {told(skips)}; {kept}; {_way_on(reason, config, updates=updates)}")


def _way_on(reason: str, config: RunConfig, *, updates: int) -> str:
    if reason in ("latents not finite", "text not finite"):
        checks = [f"flowmask cache verify {folder}" for folder in config.data.folders()]
        return f"check the data: {'; '.join(checks) or config.data.caches}"
    if reason in _SPIKES:
        return "lower train.lr, or raise guard.grad_norm_spike or guard.loss_spike"
    if reason == "noise not finite":
        return "this is a bug of FlowMask: report log.txt, which names the examples"
    other = "a lower train.lr from an earlier checkpoint" if updates else "other weights"
    return f"see log.txt for the examples; try train.precision=fp32, or {other}"
