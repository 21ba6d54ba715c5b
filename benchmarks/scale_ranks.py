"""Growth with the number of ranks: messages of a step and of a save, and the cost of failures.

    python benchmarks/scale_ranks.py steps --ranks 2 8 64 1000
    python benchmarks/scale_ranks.py saves --ranks 2 8 64 1000
    python benchmarks/scale_ranks.py failures

Each prints a table. `steps` and `saves` run rank 0 of a group of torch's `fake` backend, whose other ranks give the
answers of rank 0; so counts and bytes are exact, and the results of the collectives are not.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import fresh, part, run, table

STAGES = (0, 1, 2, 3)


def _traffic() -> Any:
    """A context whose `seen` counts the collectives inside, and the bytes that rank 0 gets by them."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Traffic(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen = {"collectives": 0, "received": 0}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d":
                self.seen["collectives"] += 1
                self.seen["received"] += sum(t.nbytes for t in tree_iter(args[0]) if isinstance(t, torch.Tensor))
            return function(*args, **(kwargs or {}))

    return Traffic()


@part("steps")
def steps(arguments: Namespace) -> None:
    """Collectives of an optimizer step, and the bytes that a rank gets by them for each parameter, by ZeRO stage."""

    def rows() -> Iterator[Sequence[object]]:
        for stage in STAGES:
            for ranks in arguments.ranks:
                found = fresh("step_among", ranks, stage)
                each = f"{found['received'] / found['parameters']:.2f}"
                yield stage, ranks, found["collectives"], each, f"{found['seconds']:.2f}"

    table(("ZeRO", "ranks", "collectives", "bytes a parameter", "CPU s of rank 0"), rows())


def step_among(ranks: str, stage: str) -> dict[str, Any]:
    """The second step of the real engine, in bf16, of a small DiT."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from flowmask.trainer.step.engine import Engine
    from flowmask.trainer.train_config import TrainConfig

    class MeanSquare:
        def loss(self, module: Any, batch: Any) -> Any:
            found = module(
                hidden_states=batch.latents,
                timestep=batch.timestep,
                encoder_hidden_states=batch.text,
                return_dict=False,
            )[0]
            return found.float().square().mean(), {}

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(ranks))
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4}
    dit = WanTransformer3DModel(in_channels=32, text_dim=64, freq_dim=64, rope_max_seq_len=16, **heads)
    parameters = sum(parameter.numel() for parameter in dit.parameters())
    options: dict[str, Any] = {"zero_stage": int(stage), "precision": "bf16", "micro_batch": 1}
    engine = Engine(dit, train=TrainConfig(steps=2, global_batch=int(ranks), **options))
    batch = SimpleNamespace(
        latents=torch.randn(1, 32, 2, 8, 8).bfloat16(),
        timestep=torch.tensor([500]),
        text=torch.randn(1, 8, 64).bfloat16(),
        digest=0,
    )
    engine.step(MeanSquare(), [batch])  # type: ignore[list-item]
    traffic, began = _traffic(), time.process_time()
    with traffic:
        engine.step(MeanSquare(), [batch])  # type: ignore[list-item]
    return {**traffic.seen, "parameters": parameters, "seconds": time.process_time() - began}


@part("saves")
def saves(arguments: Namespace) -> None:
    """The data that rank 0 of a group sends, receives and writes for one checkpoint, without its own tensors."""

    def rows() -> Iterator[Sequence[object]]:
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found = fresh("save_among", folder, ranks)
            yield ranks, found["collectives"], found["received"], found["state_bytes"], f"{found['seconds']:.2f}"

    table(("ranks", "collectives", "bytes that a rank gets", "bytes of state.json", "CPU s of rank 0"), rows())


def save_among(folder: str, ranks: str) -> dict[str, Any]:
    """One save of the real `Checkpoints` on rank 0 of a group in which all ranks answer the same."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from flowmask.trainer.config import CheckpointConfig
    from flowmask.trainer.state.saving import Checkpoints

    traffic = _traffic()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=int(ranks))
    piece = SimpleNamespace(name="w", start=0, tensors=lambda: {"master": torch.zeros(4)})
    engine = SimpleNamespace(updates=1, zero_stage=1, shapes={"w": (4,)}, fragments=lambda: [piece])
    average = SimpleNamespace(updates=1, shadow=[torch.zeros(4)])
    checkpoints = Checkpoints(Path(folder), config=CheckpointConfig(), warn=print)
    began = time.process_time()
    with traffic:
        checkpoints.begin(engine, average, step=1, state={})  # type: ignore[arg-type]
        checkpoints.settle()
    seconds = time.process_time() - began
    return {
        **traffic.seen,
        "state_bytes": Path(folder, "step_00000001", "state.json").stat().st_size,
        "seconds": seconds,
    }


@part("failures")
def failures(arguments: Namespace) -> None:
    """The longest restart with which 128 nodes that fail every 3 h keep 99 %, by the cost of a save."""
    from flowmask.launch.plan.failures import Saving

    def rows() -> Iterator[Sequence[object]]:
        for stall_s, write_s in ((0.002, 4.5), (0.1, 4.5), (0.1, 30.0), (1.0, 10.0)):
            enough = [s for s in range(601) if _best(Saving(10_800, s, stall_s, write_s)) >= 0.99]
            costs = Saving(10_800, 60, stall_s, write_s)
            every = costs.best_interval_s()
            longest = f"{enough[-1]} s" if enough else "none"
            yield f"{stall_s:g} s", f"{write_s:g} s", f"{every:.0f} s", f"{100 * costs.effective(every):.2f} %", longest

    head = ("a save stalls for", "and counts after", "best interval", "kept, restart 60 s", "longest restart for 99 %")
    table(head, rows())


def _best(costs: Any) -> float:
    return float(costs.effective(costs.best_interval_s()))


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 1000])
    parser.add_argument("--folder", type=Path, help="where to write; default: the place for temporary files")


if __name__ == "__main__":
    run(__doc__ or "", globals(), options)
