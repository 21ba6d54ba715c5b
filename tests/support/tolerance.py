"""The largest difference of two computations of one number that add the same terms in another order.

The order of a sum depends on the CPU: its vector width, its caches, the kernels that torch and oneDNN choose.
So a tolerance is never a number measured on one machine; each follows from the sums behind it.
"""

import math

import torch
from torch import Tensor


def summed(terms: int, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Bound for a sum of `terms` in `dtype` whose partial sums are no larger than `scale`.

    An addition rounds by at most eps / 2 of the partial sum. Roundings have either sign, so n of them add up to
    about sqrt(n) eps / 2. Two computations round independently. The bound is twice the sum of both:
    2 sqrt(n) eps scale.
    """
    return 2 * math.sqrt(terms) * torch.finfo(dtype).eps * scale


def add_apart(apart: dict[Tensor, Tensor], adam: torch.optim.Optimizer, *, terms: int) -> None:
    """Add to `apart` the largest difference that one step of `adam` can make for each element between two computations.

    terms: number of terms in a gradient. Their scale is the model's largest gradient, which gives its error d.
    Adam moves by lr m / (sqrt(v) + eps), and d changes m and sqrt(v) by no more than d: 2 lr d / (sqrt(v) + eps).
    An element with large gradients keeps its digits. Where the terms cancel, the sum is no larger than its error,
    and a step of either sign is correct: 2 lr.
    """
    weights = [weight for group in adam.param_groups for weight in group["params"]]
    largest = max(float(weight.grad.abs().max()) for weight in weights)
    error = summed(terms, torch.float32, largest)
    for group in adam.param_groups:
        for weight in group["params"]:
            state = adam.state[weight]
            root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
            step = group["lr"] * (2 * error / (root + group["eps"])).clamp(max=2.0)
            apart[weight] = apart.get(weight, torch.zeros_like(step)) + step
