"""The attention kernels of the DiT: each DiT has its own choice, and kernels differ only by rounding."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from attention_stand_in import RAN, Seen, stand_in
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from flowmask.models import dit as dits
from flowmask.models.config import Attention, Recompute, TrainAttention
from flowmask.models.dit import (
    KERNELS,
    build_dit,
    compile_blocks,
    recompute_blocks,
    require_attention,
    use_attention,
    velocity,
)
from flowmask.models.errors import ConfigError

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
}
TOKENS, TEXT, BATCH = 18, 7, 2
OTHERS = [name for name in get_args(Attention) if name != "native"]
TRAINABLE = get_args(TrainAttention)
SELF, CROSS = ((BATCH, length, 2, 16) for length in (TOKENS, TEXT))


def random_dit(dtype: torch.dtype = torch.float32) -> Any:
    dit = build_dit(CONFIG, in_channels=32)
    source = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=source) * 0.1 for k, v in dit.state_dict().items()}
    for name in state:
        if ".norm_q" in name or ".norm_k" in name:  # as in trained weights: some tokens get more attention
            state[name] += 1
    dit.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
    return dit


def out_of(dit: Any) -> Tensor:
    source = torch.Generator().manual_seed(1)
    x_t, video = torch.randn(2, BATCH, 16, 3, 4, 6, generator=source)
    text = torch.randn(BATCH, TEXT, 24, generator=source)
    return velocity(dit, x_t=x_t, video_latent=video, timestep=torch.tensor([1000, 437]), text=text)


def loss_and_gradient(dit: Any) -> tuple[Tensor, Tensor]:
    loss = out_of(dit).square().mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in dit.parameters() if p.grad is not None])


@pytest.fixture(name="stand_in")
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Attention], Seen]]:
    RAN.clear()
    yield lambda name: stand_in(name, monkeypatch)
    RAN.clear()


@pytest.mark.parametrize("name", get_args(Attention))
@torch.no_grad()
def test_every_attention_of_a_dit_goes_to_the_kernels_that_it_names(name: Attention, stand_in: Any) -> None:
    plain = out_of(random_dit())
    seen, dit = stand_in(name), random_dit()
    use_attention(dit, name, key="attention")
    torch.testing.assert_close(out_of(dit), plain, rtol=1e-5, atol=1e-6)
    assert seen.shapes == [(SELF, SELF, SELF), (SELF, CROSS, CROSS)] * 2
    for options in seen.options:  # defaults only: no mask, the scale of the head, no sequence parallelism
        assert {key for key, value in options.items() if value} <= set(), options


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_recomputation_keeps_or_repeats_them_and_changes_no_bit(kind: Recompute, times: int, stand_in: Any) -> None:
    stand_in("flash")
    plain, saving = random_dit(), random_dit()
    for dit in (plain, saving):
        use_attention(dit, "flash", key="train.attention")
    recompute_blocks(saving, kind)
    wanted = loss_and_gradient(plain)
    RAN.clear()
    for one, other in zip(wanted, loss_and_gradient(saving), strict=True):
        assert torch.equal(one, other)
    assert len(RAN) == 4 * times


@pytest.mark.long  # test_dit.py compiles blocks in the short run
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_compiled_blocks_go_to_them_too(kind: Recompute, stand_in: Any) -> None:
    stand_in("flash")
    plain, compiled = random_dit(), random_dit()
    for dit in (plain, compiled):
        use_attention(dit, "flash", key="train.attention")
    compile_blocks(compiled, recompute=kind)
    wanted = loss_and_gradient(plain)
    RAN.clear()
    for one, other in zip(wanted, loss_and_gradient(compiled), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert RAN == [(SELF, SELF, SELF), (SELF, CROSS, CROSS)] * 2


@torch.no_grad()
def test_a_dit_chooses_for_itself_alone(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _AttentionBackendRegistry._active_backend
    seen = {name: stand_in(name) for name in ("flash", "sage", "cudnn")}
    first, second = random_dit(), random_dit()
    use_attention(first, "flash", key="attention")
    use_attention(second, "sage", key="attention")
    assert _AttentionBackendRegistry._active_backend is before
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName._NATIVE_CUDNN)  # environment
    for dit in (random_dit(), first, second, first):
        out_of(dit)
    assert {name: len(each.shapes) for name, each in seen.items()} == {"flash": 8, "sage": 4, "cudnn": 0}


class Rounded(torch.autograd.Function):
    """Values in the forward pass, and gradients in the backward pass, off by a relative `size` up or down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float, source: torch.Generator) -> Tensor:
        ctx.size, ctx.source = size, source
        return off(x, size, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return off(grads[0], ctx.size, ctx.source), None, None


def off(x: Tensor, size: float, source: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, x.shape, generator=source) * 2 - 1
    return (x.double() * (1 + size * signs)).to(x.dtype)


def rounding_of_attention(dtype: torch.dtype) -> float:
    """The largest difference of two kernels, as a relative change of the inputs and outputs of attention.

    A kernel rounds the probabilities before the product with the values (as if the values were rounded), sums of 16
    channels and of 18 tokens, and its result. In bf16 the sums are in fp32 and don't count; in fp32 a sum of n is off
    by at most n roundings. Two kernels differ by at most twice that.
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * unit * (1 if dtype == torch.bfloat16 else TOKENS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_differ_by_the_rounding_of_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size, names = rounding_of_attention(dtype), AttentionBackendName
    native = random_dit(dtype)
    wanted = loss_and_gradient(native)
    of_math = _AttentionBackendRegistry._backends[names._NATIVE_MATH]

    def apart(attend: Callable[..., Tensor]) -> list[float]:
        """Relative changes of loss and gradient."""
        dit = random_dit(dtype)
        with monkeypatch.context() as patched:
            patched.setitem(_AttentionBackendRegistry._backends, names.NATIVE, attend)
            found = loss_and_gradient(dit)
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    def rounded(seed: int) -> Callable[..., Tensor]:
        source = torch.Generator().manual_seed(seed)

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            given = [Rounded.apply(x, size, source) for x in (query, key, value)]
            out: Tensor = Rounded.apply(of_math(*given), size, source)
            return out

        return attend

    allowed = [max(changes) for changes in zip(*(apart(rounded(seed)) for seed in range(5)), strict=True)]
    allowed[0] += torch.finfo(torch.float32).eps  # the loss is given in fp32
    found = apart(lambda query, key, value, **options: of_math(query, key, value))
    wrong = apart(lambda query, key, value, **options: of_math(query * 4, key, value))  # without the scale
    assert found[1] > 0, "one and the same kernel"
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), (found, allowed)
    assert wrong[1] > allowed[1], (wrong, allowed)


def test_training_takes_the_kernels_that_have_a_backward_pass_and_share_tokens_over_ranks() -> None:
    backends = {KERNELS[name].backend.value for name in TRAINABLE}
    assert backends <= _AttentionBackendRegistry._supports_context_parallel
    assert attention_dispatch._wrapped_flash_attn_3._backward_fn is None
    with pytest.raises(NotImplementedError):
        attention_dispatch._sage_attention_backward_op(None, torch.zeros(1))


@pytest.mark.parametrize("name", OTHERS)
def test_kernels_that_cannot_run_are_refused_in_one_line(name: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str = "cuda", *, wide: int | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            if wide is None:
                require_attention(name, key="train.attention", device=torch.device(device))
            else:
                use_attention(
                    build_dit(CONFIG | {"attention_head_dim": wide}, in_channels=32), name, key="train.attention"
                )
        said = str(caught.value)
        assert said.startswith(f"train.attention is {name}, ") and "set train.attention to native" in said
        assert "\n" not in said
        return said

    assert "needs a GPU" in refused("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "this one has 7.5" in refused()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def missing(backend: AttentionBackendName) -> None:
        raise RuntimeError("package is missing")

    monkeypatch.setattr(dits, "_check_attention_backend_requirements", missing)
    assert KERNELS[name].needs in refused()
    for wide in (12, KERNELS[name].widest + 8):
        assert f"are {wide} wide" in refused(wide=wide)
    require_attention("native", key="train.attention", device=torch.device("cpu"))
