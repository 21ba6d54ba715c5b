"""Sequence parallelism: the DiT tokens of each example are split over `train.sequence_parallel` neighbouring ranks.

diffusers implements it (context parallelism, Ulysses): tokens are split before the first block, each attention
exchanges them for heads and back, and the output is gathered on every rank of the group. Its entry point,
`enable_parallelism`, divides by the number of accelerators and so can't run on a CPU; this file calls its
inner functions. Refuses numbers of heads or tokens that the ranks can't share evenly.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowmask.data_pipeline.cache.manifest import BucketEntry
from flowmask.models.cost.flops import dit_tokens
from flowmask.models.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def split_tokens(module: "nn.Module", *, ranks: int) -> None:
    """Split the tokens of `module` over groups of `ranks` neighbouring ranks, from now on; 1 changes nothing.

    Then every rank of a group must call it with the same batch, and gets the whole output. A loss of that
    output gives each rank the gradient of its own tokens: the full gradient is the *sum* over the group.
    Collective; `refuse_uneven` checks beforehand whether it is possible.
    """
    if ranks == 1:
        return
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention import AttentionModuleMixin

    from flowmask.trainer import distributed

    context = ContextParallelConfig(ulysses_degree=ranks)
    parallel = ParallelConfig(context_parallel_config=context)
    mesh = distributed.sequence_mesh(ranks)
    parallel.setup(distributed.rank(), distributed.world_size(), distributed.device(), mesh=mesh)
    for part in module.modules():
        if isinstance(part, AttentionModuleMixin):
            processor: Any = part.processor
            processor._parallel_config = parallel
    # it would be printed in every step
    warnings.filterwarnings("ignore", message=".*all_gather_tensor", category=FutureWarning)
    dit: Any = module
    apply_context_parallel(dit, context, {name: cut for name, cut in dit._cp_plan.items() if name})


def refuse_uneven(config: Mapping[str, Any], *, ranks: int, buckets: Sequence[BucketEntry]) -> None:
    """ConfigError if `ranks` can't share the heads or the tokens of a bucket evenly; loads nothing.

    config: constructor arguments of the trained WanTransformer3DModel; not read if `ranks` is 1
    """
    if ranks == 1:
        return
    heads = int(config["num_attention_heads"])
    tokens = {bucket.name: dit_tokens(config, bucket.latent_shape) for bucket in buckets}
    counts = [heads, *tokens.values()]
    fits = ", ".join(str(n) for n in range(1, heads + 1) if not any(count % n for count in counts))
    fix = f"set train.sequence_parallel to one of {fits}"
    if heads % ranks:
        raise ConfigError(f"train.sequence_parallel is {ranks}; the DiT's {heads} heads can't be shared: {fix}")
    for name, count in tokens.items():
        if count % ranks:
            raise ConfigError(
                f"train.sequence_parallel is {ranks}; the {count} tokens of clips {name} "
                f"(frames x height x width) can't be shared evenly: {fix}, or build the cache at another size"
            )
