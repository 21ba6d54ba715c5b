"""The DiT's velocity: injection by concatenation, dtypes, a rotary table that keeps its precision, and speed."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flowmask.models.dit import (
    PATCH_KEY,
    Recompute,
    build_dit,
    compile_blocks,
    recompute_blocks,
    require_compiler,
    velocity,
    widen,
)
from flowmask.models.errors import ConfigError

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
}


def random_dit(channels: int, seed: int = 0) -> torch.nn.Module:
    dit = build_dit(CONFIG, in_channels=channels)
    source = torch.Generator().manual_seed(seed)
    state = {k: torch.randn(v.shape, generator=source) * 0.1 for k, v in dit.state_dict().items()}
    dit.load_state_dict(state, assign=True)
    return dit


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(2, batch, 16, 3, 4, 6, generator=source)
    return {
        "x_t": latents[0],
        "video_latent": latents[1],
        "timestep": torch.tensor([1000, 437][:batch]),
        "text": torch.randn(batch, 7, 24, generator=source),
    }


@torch.no_grad()
def test_a_plain_dit_never_sees_the_video_and_a_wide_one_does() -> None:
    given = inputs()
    other = {**given, "video_latent": -given["video_latent"]}
    plain, wide = random_dit(16), random_dit(32)
    assert torch.equal(velocity(plain, **given), velocity(plain, **other))
    assert not torch.allclose(velocity(wide, **given), velocity(wide, **other))


@torch.no_grad()
def test_a_widened_dit_starts_out_equal_to_the_plain_one() -> None:
    plain, wide = random_dit(16), build_dit(CONFIG, in_channels=32)
    state = plain.state_dict()
    wide.load_state_dict({**state, PATCH_KEY: widen(state[PATCH_KEY])}, assign=True)
    assert torch.allclose(velocity(plain, **inputs()), velocity(wide, **inputs()), atol=1e-6)


@torch.no_grad()
def test_an_example_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    dit, given = random_dit(32), inputs()
    alone = velocity(dit, **{name: tensor[:1] for name, tensor in given.items()})
    assert torch.allclose(velocity(dit, **given)[:1], alone, atol=1e-5)


def test_the_rotary_table_stays_float32_through_casts_and_copies() -> None:
    dit = random_dit(32)
    want = dit.rope.freqs_cos.clone()
    for cast in (dit.bfloat16(), copy.deepcopy(dit).to("cpu", torch.float16), dit.float()):
        assert cast.rope.freqs_cos.dtype == torch.float32 and torch.equal(cast.rope.freqs_cos, want)
    assert dit.proj_out.weight.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("timestep", [1000, 437, 3])
def test_bfloat16_weights_give_a_float32_velocity_near_the_float32_one(timestep: int) -> None:
    given = {**inputs(), "timestep": torch.tensor([timestep, timestep])}
    dit = random_dit(32)
    exact = velocity(dit, **given)
    half = velocity(dit.bfloat16(), **given)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.02 * exact.norm()


def test_gradients_reach_every_parameter() -> None:
    dit = random_dit(32)
    velocity(dit, **inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dit.parameters())


def train_once(dit: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and all gradients of one pass."""
    loss = velocity(dit, **inputs()).square().mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputation_changes_no_bit_of_loss_and_gradients(kind: Recompute, dtype: torch.dtype) -> None:
    plain, saving = random_dit(32).to(dtype), random_dit(32).to(dtype)
    recompute_blocks(saving, kind)
    for one, other in zip(train_once(plain), train_once(saving), strict=True):
        assert torch.equal(one, other)


class InPlaceLinear(torch.autograd.Function):
    """A linear layer as in DeepSpeed's ZeRO 3: the bias is added to the product in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight, bias), grad = ctx.saved_tensors, grads[0]
        rows = grad.flatten(0, -2)
        of_bias = None if bias is None else rows.sum(0)
        return grad.matmul(weight), rows.t().matmul(x.flatten(0, -2)), of_bias


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_nor_does_it_where_layers_add_their_bias_in_place(kind: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return InPlaceLinear.apply(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    plain, saving = random_dit(32), random_dit(32)
    recompute_blocks(saving, kind)
    for one, other in zip(train_once(plain), train_once(saving), strict=True):
        assert torch.equal(one, other)


def test_recomputation_keeps_less_the_fuller_it_is() -> None:
    held = {kind: bytes_held(kind) for kind in ("none", "selective", "full")}
    assert held["full"] < 0.6 * held["selective"] and held["selective"] < 0.6 * held["none"], held


def bytes_held(kind: Recompute) -> int:
    """Bytes that are alive after a forward pass, but not before it."""
    dit = random_dit(32).train()
    recompute_blocks(dit, kind)
    given = inputs()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = velocity(dit, **given).square().mean()
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    loss.backward()
    return held


@pytest.mark.parametrize("kind", ["none", pytest.param("selective", marks=pytest.mark.long)])
def test_compiled_blocks_compute_what_the_others_do(kind: Recompute) -> None:
    plain, compiled = random_dit(32), random_dit(32)
    torch._dynamo.reset()  # else a compiled program of another test is used
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled, recompute=kind)
    for one, other in zip(train_once(plain), train_once(compiled), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one program for all blocks"


def test_a_process_killed_while_a_program_is_compiled_leaves_none_in_the_cache(tmp_path: Path) -> None:
    """With a compiler that writes in two parts and kills the process that called it between them."""
    compiler = tmp_path / "compiler"
    compiler.write_text('printf half > "$3"; test -z "$1" || { kill -KILL $PPID; exit; }; printf " whole" >> "$3"')
    require_compiler()
    program = tmp_path / "program.so"
    compile_program = f"sh {compiler} %s -o {program}"
    child = os.fork()
    if not child:
        torch._inductor.cpp_builder.run_compile_cmd(compile_program % "killing", str(tmp_path))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and not program.exists()
    (left,) = {*tmp_path.iterdir()} - {compiler}
    os.utime(left, (0, 0))  # long ago
    torch._inductor.cpp_builder.run_compile_cmd(compile_program % "''", str(tmp_path))
    assert program.read_text() == "half whole" and {*tmp_path.iterdir()} == {compiler, program}


def test_a_folder_of_compiled_programs_that_cannot_be_written_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/programs")
    torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear()  # what earlier tests found out
    monkeypatch.setattr(torch._inductor.cpu_vec_isa.VecISA, "__bool__", lambda isa: isa.check_build("int x;"))
    with pytest.raises(ConfigError, match=r"/proc/programs.*No such file.*set TORCHINDUCTOR_CACHE_DIR") as caught:
        require_compiler()
    assert "\n" not in str(caught.value)
    torch._inductor.cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_without_a_compiler_compilation_is_refused_in_one_line() -> None:
    # torch's own patch: its config takes pytest's undo for a deletion of the key
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with missing, pytest.raises(ConfigError, match=r"train\.compile is true, but no C\+\+ compiler") as caught:
        compile_blocks(random_dit(32), recompute="none")
    assert "\n" not in str(caught.value)
