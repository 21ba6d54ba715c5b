"""The flow objective with Huber's error in place of the squared one."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import huber_loss

from flowmask.trainer.objectives.flow_matching import FlowMatching, FlowMatchingConfig


class HuberConfig(FlowMatchingConfig):
    """The section `objective` of a config with `kind: huber`."""

    kind: Literal["huber"] = "huber"
    delta: float = 1.0


class Huber(FlowMatching):
    """Errors above delta count in proportion, those below squared."""

    Config = HuberConfig

    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Each example's error [B] of velocities [B 16 f h w]."""
        return huber_loss(predicted, target, delta=self._config.delta, reduction="none").flatten(1).mean(1)
