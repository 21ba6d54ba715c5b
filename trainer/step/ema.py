"""Exponential moving average of the fp32 masters, sharded like them: 4 bytes per parameter over all ranks.

Keeps the shadow of this rank's fragments and the number of updates. No collective runs in `update`; whole
tensors are gathered only on request.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flowmask.trainer.step.engine import Engine


def decay_of_update(number: int, *, decay: float) -> float:
    """Weight of the old average in update s = `number`: 0 at the first, then min(decay, s / (9 + s))."""
    return 0.0 if number <= 1 else min(decay, number / (9 + number))


class ShardedEma:
    """The average over `engine.fragments()`; call `update` after every taken step, not after a skipped one."""

    def __init__(self, engine: Engine, *, decay: float):
        self._engine = engine
        self._decay = decay
        self._masters = [piece.master for piece in engine.fragments()]
        self.shadow: Sequence[Tensor] = [master.clone() for master in self._masters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the masters; the first update copies them."""
        self.updates += 1
        weight = 1.0 - decay_of_update(self.updates, decay=self._decay)
        if self._masters:
            torch._foreach_lerp_(list(self.shadow), self._masters, weight)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters, whole, fp32 of the module's shapes, on rank 0's host (else empty); collective."""
        return self._engine.full_state_dict(self.shadow)

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each averaged parameter whole, fp32 of the module's shapes, on each rank's device, one by one; collective."""
        return self._engine.whole_tensors(self.shadow)
