"""The scenarios that the trainer's tests run in every rank: the same small trainings under many settings."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from counters import Operators
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from flowmask.trainer import distributed
from flowmask.trainer.config import CheckpointConfig
from flowmask.trainer.state.saving import Checkpoints
from flowmask.trainer.step import zero
from flowmask.trainer.step.ema import ShardedEma
from flowmask.trainer.step.engine import Engine, StepResult
from flowmask.trainer.train_config import TrainConfig

GLOBAL_BATCH = 8
STEPS, SAVED = 6, 3  # steps of a trajectory; the step of its checkpoint
TOKENS = GLOBAL_BATCH * 2 * 2 * 2  # in a step; a gradient is a sum over them
STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
EMA_DECAY = 0.6
PERSISTENT = 600  # elements; ZeRO 3 keeps tensors up to this size whole on every rank


@dataclass
class Batch:
    """Examples of a global batch: latents, target, timestep, text; `use` names the branch of `Branches`."""

    latents: Tensor
    target: Tensor
    timestep: Tensor
    text: Tensor
    digest: int
    use: str = "a"


class Velocity:
    """Mean squared error of the DiT's output, as the real objective computes it."""

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = next(module.parameters()).dtype
        found = module(
            hidden_states=batch.latents.to(dtype),
            timestep=batch.timestep,
            encoder_hidden_states=batch.text.to(dtype),
            return_dict=False,
        )[0]
        loss = (found.float() - batch.target).square().mean()
        return loss, {"double": 2 * loss.detach()}


class SteepVelocity(Velocity):
    """A finite loss with an infinite gradient on one rank."""

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(module, batch)
        if distributed.rank() == distributed.world_size() - 1:
            loss = loss + (loss - loss.detach()).abs().sqrt()
        return loss, metrics


class Branches(nn.Module):
    """One layer that is never used, and two layers that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.never = nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(3, 3)

    def forward(self, x: Tensor, use: str) -> Tensor:
        result: Tensor = getattr(self, use)(x)
        return result


class BranchLoss:
    """Loss of `Branches`, by the batch's `use`."""

    def loss(self, module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = next(module.parameters()).dtype
        return module(batch.text[:, 0].to(dtype), batch.use).float().square().mean(), {}


LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
NORM_TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


def tiny_dit() -> WanTransformer3DModel:
    """Two layers of width 24 with the same random weights on every rank."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=8,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=16,
    )


def global_batch(step: int) -> list[Batch]:
    """The examples of `step`, one by one; a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    latents = torch.randn(GLOBAL_BATCH, 8, 2, 4, 4, generator=generator)
    target = torch.randn(GLOBAL_BATCH, 4, 2, 4, 4, generator=generator)
    timestep = torch.randint(1, 1001, (GLOBAL_BATCH,), generator=generator)
    text = torch.randn(GLOBAL_BATCH, 6, 16, generator=generator)
    digests = [(1 << 63) + 977 * step + place for place in range(GLOBAL_BATCH)]
    one = [slice(i, i + 1) for i in range(GLOBAL_BATCH)]
    return [Batch(latents[s], target[s], timestep[s], text[s], digest=d) for s, d in zip(one, digests)]


def micro_batches(step: int, *, micro: int) -> list[Batch]:
    """This rank's micro-batches of a step: a contiguous share of the global batch."""
    share = GLOBAL_BATCH // distributed.world_size()
    mine = global_batch(step)[distributed.rank() * share :][:share]
    groups = [mine[i : i + micro] for i in range(0, share, micro)]
    return [
        Batch(
            torch.cat([b.latents for b in group]),
            torch.cat([b.target for b in group]),
            torch.cat([b.timestep for b in group]),
            torch.cat([b.text for b in group]),
            digest=sum(b.digest for b in group) % (1 << 64),
            use="ab"[step % 2],
        )
        for group in groups
    ]


def settings(*, stage: int, precision: str, micro: int = 2, clip: float = 1.0) -> TrainConfig:
    """A config whose learning rate is high enough to show differences in a dozen steps."""
    values: dict[str, Any] = {"zero_stage": stage, "precision": precision, "grad_clip": clip}
    return TrainConfig(steps=STEPS, lr=2e-3, global_batch=GLOBAL_BATCH, micro_batch=micro, **values)


class Training:
    """An engine with its EMA and its checkpoints."""

    def __init__(
        self,
        *,
        stage: int,
        precision: str,
        micro: int = 2,
        folder: Path | None = None,
        kept: CheckpointConfig | None = None,
        change: dict[str, Any] | None = None,
    ):
        self.micro = micro
        config = settings(stage=stage, precision=precision, micro=micro).model_copy(update=change)
        self.engine = Engine(tiny_dit(), train=config)
        self.ema = ShardedEma(self.engine, decay=EMA_DECAY)
        self.warnings: list[str] = []
        kept = kept or CheckpointConfig(keep_last=2)
        self.checkpoints = Checkpoints(folder or Path(), config=kept, warn=self.warnings.append)

    def run(self, steps: range, *, objective: Any = None) -> list[StepResult]:
        results = []
        for step in steps:
            self.engine.set_lr(2e-3 * (1 - step / 40))
            batches = micro_batches(step, micro=self.micro)
            results.append(self.engine.step(objective or Velocity(), batches))
            if not results[-1].skipped:
                self.ema.update()
        return results

    def begin(self, step: int, *, best: bool = False) -> None:
        state = {"step": step, "note": "x"}
        self.checkpoints.begin(self.engine, self.ema, step=step, state=state, best=best)

    def save(self, step: int, *, best: bool = False) -> Path:
        self.begin(step, best=best)
        self.checkpoints.require(step)
        return self.checkpoints.folder / f"step_{step:08d}"

    def restore(self) -> dict[str, Any]:
        path = self.checkpoints.newest()
        assert path is not None
        return self.checkpoints.restore(self.engine, self.ema, path)

    def everything(self) -> dict[str, Tensor]:
        """All masters, moments and shadows, whole, on rank 0."""
        pieces = self.engine.fragments()
        whole = {f"ema|{name}": value for name, value in self.ema.full_state_dict().items()}
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            values = [piece.tensors()[kind] for piece in pieces]
            whole |= {f"{kind}|{n}": v for n, v in self.engine.full_state_dict(values).items()}
        return whole


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the bit, key by key."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _plain(results: list[StepResult]) -> list[list[float]]:
    return [[result.loss, result.grad_norm] for result in results]


def trajectories(
    *,
    folder: str,
    micros: list[int],
    resume: bool,
    stages: tuple[int, ...] = STAGES,
    clean: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Training for `STEPS` steps with each setting; with `resume`, another engine continues from step `SAVED`.

    clean: gets losses and state of the first `SAVED` steps, with `resume`
    """
    found: dict[str, Any] = {}
    for precision, stage, micro in itertools.product(PRECISIONS, stages, micros):
        if micro != 2 and distributed.world_size() > 1 and stage != 1:
            continue
        place = Path(folder) / f"{precision}_{stage}"
        training = Training(stage=stage, precision=precision, micro=micro, folder=place)
        start = training.everything()
        row: dict[str, Any] = {}
        if distributed.rank() == 0:
            row["starts_exact"] = all(
                torch.equal(p.detach(), start[f"master|{n}"]) for n, p in tiny_dit().named_parameters()
            )
        results = training.run(range(1))
        with Operators() as operators:
            results += training.run(range(1, 2))
        row["collectives"] = operators.collectives
        results += training.run(range(2, SAVED))
        if resume and micro == 2:
            training.save(SAVED)
            saved = training.everything()
            if clean is not None:
                clean[f"{precision}/{stage}"] = {"losses": _plain(results), "state": saved}
        results += training.run(range(SAVED, STEPS))
        row["losses"] = _plain(results)
        row["digests"] = [str(result.digest) for result in results]
        row["doubles"] = [result.metrics["double"] / result.loss for result in results]
        if resume and micro == 2:
            end = training.everything()
            training.engine.close()
            training = Training(stage=stage, precision=precision, folder=place)
            row["state"] = training.restore()
            row["restored_exact"] = same(saved, training.everything())
            row["resumed"] = _plain(training.run(range(SAVED, STEPS)))
            row["end_exact"] = same(end, training.everything())
            row["held"] = sum(piece.numel for piece in training.engine.fragments())
        training.engine.close()
        found[f"{precision}/{stage}/{micro}"] = row
    return found


def twice() -> dict[str, list[tuple[str, int]]]:
    """Collectives of two faulty steps: the first gathers the weights twice, the second does our reductions twice."""
    training, real = Training(stage=3, precision="bf16"), distributed.all_reduce_sum
    training.run(range(1))
    with Operators() as gathering:
        training.run(range(1, 2))
        training.engine.refresh_weights()
    distributed.all_reduce_sum = lambda tensor: real(real(tensor))
    with Operators() as reducing:
        training.run(range(2, 3))
    distributed.all_reduce_sum = real
    training.engine.close()
    return {"gathered": gathering.collectives, "reduced": reducing.collectives}


def skips(clean: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A NaN loss on the last rank and an infinite gradient between good steps; then losses and norms above a limit.

    clean: losses and state of `SAVED` good steps, of `trajectories`
    """
    broken: dict[str, Any] = {}
    above: dict[str, Any] = {}
    for precision, stage in itertools.product(PRECISIONS, STAGES):
        name = f"{precision}/{stage}"
        training = Training(stage=stage, precision=precision)
        seen = _plain(training.run(range(SAVED - 1)))
        before = training.everything()
        bad = micro_batches(SAVED - 1, micro=2)
        if distributed.rank() == distributed.world_size() - 1:
            bad[0].latents.fill_(torch.nan)
        results = [training.engine.step(Velocity(), bad)]
        results += training.run(range(SAVED - 1, SAVED), objective=SteepVelocity())
        untouched = same(before, training.everything())
        seen += _plain(training.run(range(SAVED - 1, SAVED)))
        before = training.everything()
        broken[name] = {
            "skipped": [result.skipped for result in results],
            "finite_loss": [result.loss == result.loss for result in results],
            "untouched": untouched,
            "as_if_never": seen == clean[name]["losses"] and same(clean[name]["state"], before),
            "updates": training.engine.updates,
        }
        limits = ({"grad_norm_limit": 1e-3}, {"loss_limit": 1e-3})
        over = [training.engine.step(Velocity(), micro_batches(SAVED, micro=2), **limit) for limit in limits]
        untouched = same(before, training.everything())
        wide = {"loss_limit": 1e9, "grad_norm_limit": 1e9}
        within = training.engine.step(Velocity(), micro_batches(SAVED, micro=2), **wide)
        above[name] = {
            "skipped": [result.skipped for result in (*over, within)],
            "norms": [result.grad_norm for result in (*over, within)],
            "untouched": untouched,
        }
        training.engine.close()
    return {"skips": broken, "spikes": above}


def decays(*, folder: str) -> dict[str, Any]:
    """Weights after four steps in which only matrices decay, and whether a checkpoint restores them."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        place = Path(folder) / f"decays_{stage}"
        change = {"weight_decay": 0.5, "weight_decay_exclude": "norms_biases"}
        training = Training(stage=stage, precision="fp32", folder=place, change=change)
        training.run(range(4))
        training.save(4)
        saved = training.everything()
        training.run(range(4, 5))
        training.restore()
        found[str(stage)] = {
            "restored_exact": same(saved, training.everything()),
            "masters": training.engine.full_state_dict(),
            "steps": training.engine.updates,
            "groups": len(training.engine._optimizer.param_groups),
        }
        training.engine.close()
    return found


def branches() -> dict[str, Any]:
    """Losses and norms when a step leaves parameters unused."""
    found: dict[str, Any] = {}
    for precision, stage in itertools.product(PRECISIONS, STAGES):
        torch.manual_seed(0)
        engine = Engine(Branches(), train=settings(stage=stage, precision=precision))
        results = [engine.step(BranchLoss(), micro_batches(step, micro=2)) for step in range(4)]
        found[f"{precision}/{stage}"] = _plain(results)
        engine.close()
    return found


def offloaded() -> dict[str, Any]:
    """Four steps around a skipped one, and steps with unused parameters, for both settings of offload_optimizer."""
    found: dict[str, Any] = {}
    for stage, offload in itertools.product((1, 2, 3), (False, True)):
        config = settings(stage=stage, precision="bf16").model_copy(update={"offload_optimizer": offload})
        bad = micro_batches(2, micro=2)
        if distributed.rank() == 0:
            bad[0].latents.fill_(torch.nan)
        dit = Engine(tiny_dit(), train=config)
        steps = [micro_batches(0, micro=2), micro_batches(1, micro=2), bad, micro_batches(3, micro=2)]
        results = [dit.step(Velocity(), batches) for batches in steps]
        dit.close()
        torch.manual_seed(0)
        turns = Engine(Branches(), train=config)
        taken = [result for result in results if not result.skipped]
        taken += [turns.step(BranchLoss(), micro_batches(step, micro=2)) for step in range(4)]
        turns.close()
        found[f"{stage}/{offload}"] = _plain(taken)
    return found


def overlapped(clean: dict[str, Any]) -> dict[str, bool]:
    """Whether steps whose reductions overlap the backward pass, as on GPUs, end with the same bits as without.

    clean: the states after `SAVED` steps without, of `trajectories`
    """
    found, real = {}, zero.config

    def config(train: TrainConfig, *, world: int) -> dict[str, Any]:
        made = real(train, world=world)
        assert made["zero_optimization"]["overlap_comm"] is False
        made["zero_optimization"]["overlap_comm"] = True
        return made

    zero.config = config
    for stage, precision in itertools.product((1, 2, 3), PRECISIONS):
        training = Training(stage=stage, precision=precision)
        training.run(range(SAVED))
        found[f"{stage}/{precision}"] = same(clean[f"{precision}/{stage}"]["state"], training.everything())
        training.engine.close()
    zero.config = real
    return found


def average() -> dict[str, Any]:
    """The EMA of 5 steps at each stage, and the same average of the gathered masters."""
    found: dict[str, Any] = {}
    for stage in (0, 1, 3):
        training = Training(stage=stage, precision="bf16")
        expected: dict[str, Tensor] = {}
        for number in range(1, 6):
            training.run(range(number, number + 1))
            masters = training.engine.full_state_dict()
            decay = 0.0 if number == 1 else min(EMA_DECAY, number / (9 + number))
            for name, value in masters.items():
                old = expected.get(name, torch.zeros(()))
                expected[name] = decay * old.double() + (1 - decay) * value.double()
        whole = training.ema.full_state_dict()
        gaps = [float((whole[name] - value).abs().max()) for name, value in expected.items()]
        found[str(stage)] = {
            "gap": max(gaps, default=0.0),
            "shadow_bytes": sum(s.numel() * s.element_size() for s in training.ema.shadow),
            "parameters": sum(torch.Size(shape).numel() for shape in training.engine.shapes.values()),
        }
        training.engine.close()
    return found


def group(*, folder: str) -> dict[str, Any]:
    """All results that the tests need from two ranks, in one group."""
    distributed.init(timeout_s=60)
    zero._PERSISTENT_ELEMENTS = PERSISTENT  # ZeRO 3 then has both kinds of parameters in a tiny model
    clean: dict[str, Any] = {}
    return {
        "rank": distributed.rank(),
        "any": [distributed.any_true(distributed.rank() == 1), distributed.any_true(False)],
        "broadcast": distributed.broadcast_object({"from": distributed.rank()}),
        "gathered": distributed.gather_objects(distributed.rank()),
        "trajectories": trajectories(folder=folder, micros=[1, 2, 4], resume=True, clean=clean),
        "twice": twice(),
        **skips(clean),
        "decays": decays(folder=folder),
        "branches": branches(),
        "offloaded": offloaded(),
        "overlapped": overlapped(clean),
        "average": average(),
    }


def continued(*, folder: str, moves: list[tuple[str, int, int]]) -> dict[str, Any]:
    """The last steps from two ranks' checkpoints at this world size; moves: precision, stage saved, stage now."""
    distributed.init(timeout_s=60)
    found = {}
    for precision, stage, to in moves:
        place = Path(folder) / f"{precision}_{stage}"
        training = Training(stage=to, precision=precision, folder=place)
        training.restore()
        found[f"{precision}/{stage}/{to}"] = _plain(training.run(range(SAVED, STEPS)))
        training.engine.close()
    return found


def assert_same_training(one: list[list[float]], other: list[list[float]], *, precision: str) -> None:
    for (loss, norm), (expected_loss, expected_norm) in zip(one, other, strict=True):
        assert abs(loss - expected_loss) <= LOSS_TOLERANCE[precision] * expected_loss
        assert abs(norm - expected_norm) <= NORM_TOLERANCE[precision] * expected_norm
