"""The work of a step is counted exactly, so that any addition is noticed; planted faults are found."""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_run import Plant, StepCounts, run_counts
from counters import Operators
from host_waits import Questions
from runs import run_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowmask.data_pipeline.read.batches import open_batches, open_reader, plan_for
from flowmask.data_pipeline.read.loader import Batch
from flowmask.launch.plan.model import architecture
from flowmask.models.cost.flops import dit_tokens, dit_training_flop
from flowmask.models.strict import read_json
from flowmask.models.vae import LatentStats
from flowmask.trainer import distributed
from flowmask.trainer.objectives import objective_named
from flowmask.trainer.objectives.flow_matching import FlowMatching
from flowmask.trainer.step.engine import Engine
from flowmask.trainer.step.optimizer import ReplicatedAdamW

# torch 2.13 on a CPU: operators of a micro-batch of two examples with its backward pass, and of the rest of a step.
OPERATORS = {"fp32": (867, 51), "bf16": (938, 52)}
STATS = 2 * 16 * 4  # bytes of the latents' mean and deviation
LIMBS = 4 * 8  # bytes of a batch's digest
CLEAN = 4  # steps without a fault


@pytest.fixture(scope="module")
def counted(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepCounts]:
    """Four steps of two micro-batches of two examples, of two shapes; then one step with each of FAULTS."""
    plants = [plant for plant, _ in FAULTS.values()]
    return run_counts(lab, tmp_path_factory.mktemp("counted") / "run", {}, steps=CLEAN, plants=plants)


@pytest.fixture(scope="module")
def clean(counted: list[StepCounts]) -> list[StepCounts]:
    steps = counted[:CLEAN]
    assert len({str(step.latents) for step in steps}) > 1
    return steps


def test_a_step_asks_the_system_for_nothing_and_other_ranks_and_its_device_twice(clean: list[StepCounts]) -> None:
    """Once for the results of the step, and once, on the host alone, for the decision to stop."""
    for step in clean:
        assert step.questions == Counter(tolist=2) and not step.operators["_local_scalar_dense"]
        assert step.reductions == Counter(all_reduce_sum=2)
        assert not step.events, "files, imports, processes, threads, connections"


def test_a_step_leaves_no_tensor_behind_and_steps_of_one_shape_do_and_need_the_same(clean: list[StepCounts]) -> None:
    assert not any(step.left_bytes for step in clean)
    for step in clean:
        (first, *_) = (other for other in clean if other.latents == step.latents)
        assert not step.unlike(first)


@pytest.mark.skipif(torch.cuda.is_available() or not torch.__version__.startswith("2.13"), reason="other operators")
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_operators_are_so_many_a_micro_batch_and_so_many_a_step_whatever_the_shape(
    lab: Path, tmp_path: Path, clean: list[StepCounts], precision: str
) -> None:
    """On a GPU, each operator launches a kernel."""
    each, around = OPERATORS[precision]
    ways = {"train.precision": precision, "train.global_batch": 2}
    steps = {1: run_counts(lab, tmp_path / "one", ways, steps=1), 2: clean}
    if precision == "fp32":
        steps[2] = run_counts(lab, tmp_path / "two", ways | {"train.global_batch": 4}, steps=2)
    for batches, some in steps.items():
        for step in some:
            assert step.operators.total() == each * batches + around, step.operators


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_a_step_costs_the_formulas_flop_and_what_it_computes_again(
    lab: Path, tmp_path: Path, clean: list[StepCounts], kind: str
) -> None:
    overrides = {"train.activation_checkpointing": kind}
    for step in clean if kind == "none" else run_counts(lab, tmp_path / "run", overrides, steps=1):
        assert step.flop == sum(_flop(lab, tuple(shape[2:]), kind) * shape[0] for shape in step.latents)


def _flop(lab: Path, latent: tuple[int, ...], kind: str, *, text_tokens: int = 256) -> float:
    """FLOP of an example: three passes, without the unneeded gradients of inputs, plus the recomputation."""
    config: dict[str, Any] = {**read_json(lab / "wan" / "transformer" / "config.json"), "in_channels": 32}
    grid: Any = latent
    s, width = dit_tokens(config, grid), config["num_attention_heads"] * config["attention_head_dim"]
    inputs = s * 4 * config["in_channels"] + config["freq_dim"] + text_tokens * config["text_dim"]
    attention = 2 * s * (s + text_tokens) * width
    products = 6 * s * width**2 + 2 * text_tokens * width**2 + 2 * s * width * config["ffn_dim"]
    again = {"none": 0, "selective": s * width * config["ffn_dim"], "full": products + attention}
    once = dit_training_flop(config, grid, text_tokens=text_tokens)
    scores = config["num_layers"] * attention  # the kernel's backward pass computes them again
    return once - 2 * inputs * width + scores + 2 * config["num_layers"] * again[kind]


@pytest.fixture
def batch(lab: Path) -> Iterator[tuple[Any, Batch]]:
    """The default objective, and a micro-batch of it on the host."""
    config = run_config(lab, lab / "unused", {"train.global_batch": 2})
    reader = open_reader(config.data)
    stats = LatentStats.from_lists(reader.manifest.latents_mean, reader.manifest.latents_std)
    objective = objective_named(config.objective, model=config.model, stats=stats)
    rest: dict[str, Any] = {"needs": objective.needs, "text_tokens": config.model.text_tokens}
    plan = plan_for(reader, global_batch=2, seed=0, remainder="carry")
    way: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_batch": 2, "threads": 0, "prefetch_batches": 1}
    with open_batches(reader, plan, prepare=objective.prepare, **way, **rest) as batches:
        yield objective, next(batches)[0]
    reader.close()


def sent(lab: Path, objective: Any, batch: Batch) -> tuple[Operators, Counter[str]]:
    """The operators and device reads of a step of one micro-batch.

    The meta device stands for a GPU: it holds no numbers, so code that asks for one fails there.
    """
    module = objective.blueprint(architecture(lab / "wan")).to(torch.bfloat16).to("meta")
    with Operators() as operators, Questions() as questions:
        loss, metrics = objective.loss(module, batch.to("meta"))
        loss.backward()
        alone: Any = type("", (), {"accumulation": 1, "_sequence_ranks": 1})
        Engine._agree(alone, [loss], [metrics], batch.digest)
    return operators, +questions.seen


def test_a_step_sends_its_device_the_batch_once_and_a_few_numbers(lab: Path, batch: tuple[Any, Batch]) -> None:
    objective, micro = batch
    operators, asked = sent(lab, objective, micro)
    held = [getattr(micro, name) for name in objective.needs]
    tensors: list[Tensor] = [*(tensor for tensor in held if tensor is not None), *micro.draws.values()]
    assert operators.sent_bytes == sum(tensor.nbytes for tensor in tensors) + STATS + LIMBS
    assert operators.waited_copies == 0 and not asked


def _after_loss(call: Callable[[Tensor, Any, Any], object]) -> Plant:
    """A fault in the objective: a call with the loss, the module and the batch."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = FlowMatching.loss

        def loss(self: FlowMatching, module: Any, batch: Any) -> Any:
            found = real(self, module, batch)
            call(found[0], module, batch)
            return found

        patch.setattr(FlowMatching, "loss", loss)

    return plant


def _unfused_attention(patch: pytest.MonkeyPatch) -> None:
    real = FlowMatching.loss

    def loss(self: FlowMatching, module: Any, batch: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return real(self, module, batch)

    patch.setattr(FlowMatching, "loss", loss)


def _unfused_publish(patch: pytest.MonkeyPatch) -> None:
    def publish(self: ReplicatedAdamW) -> None:
        for name, parameter in self.named:
            self._view(self.working, name, parameter).copy_(self._view(self.master, name, parameter))

    patch.setattr(ReplicatedAdamW, "publish", publish)


def _unfused_average(patch: pytest.MonkeyPatch) -> None:
    def one_by_one(shadow: list[Tensor], masters: list[Tensor], weight: float) -> None:
        for mine, master in zip(shadow, masters, strict=True):
            mine.lerp_(master, weight)

    patch.setattr(torch, "_foreach_lerp_", one_by_one)


_kept: list[Tensor] = []
# Each with the count that finds it. benchmarks/against.py finds lost time alone (tests/test_benchmarks.py).
FAULTS: Mapping[str, tuple[Plant, str]] = {
    "a wait": (_after_loss(lambda loss, *_: loss.item()), "questions"),
    "a branch on the device's number": (_after_loss(lambda loss, *_: 1 if loss > 0 else 0), "questions"),
    "a tensor kept": (_after_loss(lambda loss, *_: _kept.append(loss.detach().clone())), "left_bytes"),
    "a large tensor for a moment": (_after_loss(lambda *_: torch.zeros(1 << 20)), "needed_bytes"),
    "a copy of what is there": (_after_loss(lambda loss, _, batch: batch.video_mean.clone()), "operators"),
    "a product more": (_after_loss(lambda loss, module, _: loss.expand(1, 1) @ loss.expand(1, 1)), "flop"),
    "attention in parts": (_unfused_attention, "operators"),
    "weights published one by one": (_unfused_publish, "operators"),
    "an average moved one by one": (_unfused_average, "operators"),
    "a reduction more": (_after_loss(lambda *_: distributed.any_true(False)), "reductions"),
    "a file opened": (_after_loss(lambda *_: Path(__file__).read_bytes()), "events"),
    "a process started": (_after_loss(lambda *_: subprocess.run(["true"], check=True)), "events"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_its_count(counted: list[StepCounts], fault: str) -> None:
    planted = counted[CLEAN + list(FAULTS).index(fault)]
    (alike, *_) = (step for step in counted[:CLEAN] if step.latents == planted.latents)
    assert FAULTS[fault][1] in planted.unlike(alike)


@pytest.mark.parametrize("fault", ["a second copy of the batch", "a copy that is waited for", "a number made there"])
def test_a_copy_more_to_the_device_is_found(
    lab: Path, batch: tuple[Any, Batch], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    objective, micro = batch
    clean, _ = sent(lab, objective, micro)
    real = Batch.to

    def to(self: Batch, device: Any) -> Batch:
        if fault == "a second copy of the batch":
            real(self, device)
        elif fault == "a copy that is waited for":
            self.example_ids.to(device)
        else:
            torch.tensor([0.0], device=device)
        return real(self, device)

    monkeypatch.setattr(Batch, "to", to)
    operators, asked = sent(lab, objective, micro)
    if fault == "a second copy of the batch":
        assert operators.sent_bytes > 1.9 * (clean.sent_bytes - STATS - LIMBS)
    assert bool(operators.waited_copies) == (fault == "a copy that is waited for")
    assert bool(asked) == (fault == "a number made there")
