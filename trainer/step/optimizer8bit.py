"""AdamW whose two moments are stored in 8 bits, block by block; the only importer of bitsandbytes.

Stores codes: one byte per element and one fp32 scale for every block of 256, of each flat master. Other code sees
fp32 moments: pieces are decoded on request, and a load writes whole moments, which are encoded again. A
decoded block encodes to the same bytes again, so with equal block borders nothing is lost.
"""

from typing import Any

import torch
from torch import Tensor

from flowmask.models.errors import ConfigError
from flowmask.models.process import compiling_later
from flowmask.trainer.step.optimizer import ArmedAdamW, ReplicatedAdamW

BLOCK = 256
_MOST = 1 << 30  # largest number of elements of a kernel call, which counts them in 32 bits
_ENCODED = 1 << 24  # elements encoded at once
_KINDS = ("exp_avg", "exp_avg_sq")


def require() -> None:
    """Raises ConfigError if bitsandbytes is missing."""
    try:
        with compiling_later():
            import bitsandbytes.functional  # noqa: F401 - registers the operators
    except ImportError as error:
        raise ConfigError(
            "train.optimizer is adamw8bit, which needs bitsandbytes: pip install 'flowmask[gpu]', or choose adamw"
        ) from error


def code_table(*, signed: bool, device: torch.device) -> Tensor:
    """bitsandbytes' dynamic map, fp32 [256] rising to 1; signed: from -1 on.

    bitsandbytes' own signed map ends at -0.993, so a block whose largest element is negative would shrink each
    time it is decoded and encoded. In this map the first code is -1.
    """
    from bitsandbytes.functional import create_dynamic_map

    table: Tensor = create_dynamic_map(signed=signed)
    if signed:
        table[0] = -1.0
    return table.to(device)


def encode(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, uint8 [n], and the scales, fp32 [blocks], of fp32 values [n].

    bitsandbytes' CPU kernel uses coarse bins for small codes, so it does not encode decoded values to the same codes.
    """
    borders = (table[1:] + table[:-1]) / 2
    codes = torch.zeros(values.numel(), dtype=torch.uint8, device=values.device)
    scales = torch.zeros(-(-values.numel() // BLOCK), device=values.device)
    for at in range(0, values.numel(), _ENCODED):
        part = values[at : at + _ENCODED]
        rows = torch.nn.functional.pad(part, (0, -part.numel() % BLOCK)).view(-1, BLOCK)
        largest = rows.abs().amax(1)
        scales[at // BLOCK :][: len(largest)] = largest
        shares = rows / torch.where(largest > 0, largest, 1.0)[:, None]
        codes[at : at + _ENCODED] = torch.bucketize(shares, borders).view(-1)[: part.numel()]
    return codes, scales


class ArmedAdamW8bit(ArmedAdamW):
    """`ArmedAdamW` with encoded moments.

    Its step waits for the device, because bitsandbytes' kernels can't be skipped there.
    """

    def create_state(self, masters: list[Tensor]) -> None:
        """Zero moments and step count for the flat `masters`, fp32 [n]."""
        where = masters[0].device
        self._tables = {kind: code_table(signed=kind == "exp_avg", device=where) for kind in _KINDS}
        self._opened: dict[Tensor, dict[str, Tensor]] = {}
        for master in masters:
            self.state[master] = {"step": 0}
            for kind, table in self._tables.items():
                # the code of a zero, repeated: fp32 zeros of a master's size would be a start's memory peak
                code = encode(torch.zeros(1, device=where), table)[0]
                codes = code.repeat(master.numel())
                scales = torch.zeros(-(-master.numel() // BLOCK), device=where)
                self.state[master] |= {kind: codes, f"{kind}_scale": scales}

    def set_step_count(self, steps: int) -> None:
        """Adam's step number, which decides its bias correction."""
        for state in self.state.values():
            state["step"] = steps

    def moment(self, master: Tensor, kind: str, *, at: int, n: int) -> Tensor:
        """Elements at .. at + n of a moment, fp32 [n]: a copy, or a view between `open_moments` and `close_moments`."""
        if master in self._opened:
            return self._opened[master][kind].narrow(0, at, n)
        first, last = at // BLOCK, -(-(at + n) // BLOCK)
        codes = self.state[master][kind][first * BLOCK : last * BLOCK]
        scales = self.state[master][f"{kind}_scale"][first:last]
        table = self._tables[kind]
        whole: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, table, BLOCK, torch.float32)
        return whole.narrow(0, at - first * BLOCK, n)

    def open_moments(self) -> None:
        """Decode all moments, so that they can be written until `close_moments`."""
        self._opened = {
            master: {kind: self.moment(master, kind, at=0, n=master.numel()).clone() for kind in _KINDS}
            for master in self.state
        }

    def close_moments(self) -> None:
        """Encode the moments that `open_moments` decoded."""
        for master, moments in self._opened.items():
            for kind, moment in moments.items():
                self._encode(master, kind, moment)
        self._opened = {}

    def _encode(self, master: Tensor, kind: str, moment: Tensor) -> None:
        codes, scales = encode(moment, self._tables[kind])
        self.state[master] |= {kind: codes, f"{kind}_scale": scales}

    @torch.no_grad()
    def _update(self, moved: Tensor) -> None:
        if not moved:
            return
        scale = 1 / float(getattr(self, "grad_scale", 1.0))  # gradients are divided by it, as in torch's kernel
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self.state[master]["step"] += 1
                    for at in range(0, master.numel(), _MOST):
                        self._update_part(master, group, at=at, scale=scale)

    def _update_part(self, master: Tensor, group: dict[str, Any], *, at: int, scale: float) -> None:
        state, end = self.state[master], at + _MOST
        assert master.grad is not None
        codes = [state[kind][at:end] for kind in _KINDS]
        scales = [state[f"{kind}_scale"][at // BLOCK : end // BLOCK] for kind in _KINDS]
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            master.grad[at:end],
            master.detach()[at:end],
            *codes,
            *group["betas"],
            0.0,  # beta3 and alpha belong to another optimizer
            0.0,
            group["eps"],
            state["step"],
            group["lr"],
            *self._tables.values(),
            *scales,
            group["weight_decay"],
            scale,
        )


class ReplicatedAdamW8bit(ArmedAdamW8bit, ReplicatedAdamW):
    """`ReplicatedAdamW` with encoded moments."""
