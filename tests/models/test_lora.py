"""LoRA in a DiT: no change at the start, only the chosen weights are trained, and merging keeps the outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from flowmask.models.config import LoraConfig
from flowmask.models.dit import PATCH_KEY, build_dit, velocity, widen
from flowmask.models.errors import ConfigError, WeightsError
from flowmask.models.lora import add_lora, frozen_part, merged, named_parameters, plain_name, write_adapter

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
}


def base_dit(*, injected: bool = True) -> Any:
    """Random weights; with `injected`, a plain DiT that was just widened."""
    source = torch.Generator().manual_seed(0)
    dit = build_dit(CONFIG, in_channels=32 if injected else 16)
    plain = build_dit(CONFIG, in_channels=16)
    state = {k: torch.randn(v.shape, generator=source) * 0.1 for k, v in plain.state_dict().items()}
    if injected:
        state[PATCH_KEY] = widen(state[PATCH_KEY])
    dit.load_state_dict(state, assign=True)
    return dit


def adapted(config: LoraConfig, *, seed: int = 0, trained: bool = False, injected: bool = True) -> Any:
    """A DiT with adapters; `trained`: all trainable weights have moved."""
    dit = base_dit(injected=injected)
    add_lora(dit, config, seed=seed)
    if trained:
        source = torch.Generator().manual_seed(9)
        for _, parameter in learning(dit).items():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return dit


def learning(dit: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in named_parameters(dit) if p.requires_grad}


def weights(dit: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in dit.named_parameters()}


def inputs() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 2, 16, 3, 4, 6, generator=source)
    return {
        "x_t": latents[0],
        "video_latent": latents[1],
        "timestep": torch.tensor([1000, 437]),
        "text": torch.randn(2, 7, 24, generator=source),
    }


@torch.no_grad()
@pytest.mark.parametrize("injected", [True, False])
def test_the_adapted_dit_starts_out_equal_to_its_base_to_the_bit(injected: bool) -> None:
    base, dit = base_dit(injected=injected), adapted(LoraConfig(rank=3), injected=injected)
    assert torch.equal(velocity(dit, **inputs()), velocity(base, **inputs()))


def test_the_start_is_a_function_of_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = learning(adapted(LoraConfig(rank=3), seed=5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    fewer = learning(adapted(LoraConfig(rank=3, targets=("to_q",)), seed=5))
    other = learning(adapted(LoraConfig(rank=3), seed=6))
    key = "blocks.1.attn2.to_q.lora_A.weight"
    assert torch.equal(one[key], fewer[key]) and not torch.equal(one[key], other[key])
    assert not torch.equal(one[key], one[key.replace("attn2", "attn1")])
    assert one[key].abs().max() <= 24**-0.5 and one[key].std() > 0.4 * 24**-0.5


def test_names_are_those_of_the_base_and_of_the_two_factors() -> None:
    base, dit = weights(base_dit()), adapted(LoraConfig(rank=3))
    names = {name for name, _ in named_parameters(dit)}
    layers = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    factors = names - set(base)
    assert set(base) <= names and len(factors) == 2 * 2 * (4 + 4 + 2)
    assert {n.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for n in factors} <= layers
    assert all(plain_name(name) == name for name in base)


def test_only_adapters_and_the_widened_patch_embedding_learn_and_all_of_them_do() -> None:
    dit = adapted(LoraConfig(rank=3), trained=True)
    velocity(dit, **inputs()).square().mean().backward()
    whole = {name for name in learning(dit) if "lora" not in name}
    assert whole == {"patch_embedding.weight", "patch_embedding.bias"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning(dit).values())
    assert all(p.grad is None for n, p in named_parameters(dit) if n not in learning(dit))
    video = dit.patch_embedding.weight.grad[:, 16:]
    assert video.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "injected", "whole"),
    [
        ({}, False, set()),
        ({"also_train": ()}, False, set()),
        ({"also_train": ("proj_out", "patch_embedding")}, True, {"proj_out", "patch_embedding"}),
        ({"also_train": ("blocks.1.norm2", "patch_embedding")}, True, {"blocks.1.norm2", "patch_embedding"}),
    ],
)
def test_what_is_trained_whole_is_as_asked(options: dict[str, Any], injected: bool, whole: set[str]) -> None:
    names = learning(adapted(LoraConfig(rank=2, **options), injected=injected))
    assert {name.rpartition(".")[0] for name in names if "lora" not in name} == whole


def test_a_patch_embedding_that_knows_the_video_may_stay_frozen() -> None:
    dit = base_dit()
    dit.patch_embedding.weight.data[:, 16:] = 0.1
    add_lora(dit, LoraConfig(rank=2, also_train=()), seed=0)
    assert all("lora" in name for name in learning(dit))


@torch.no_grad()
@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, 12.0), (5, 1.0)])
def test_merged_weights_compute_what_the_adapters_compute(rank: int, alpha: float | None) -> None:
    config = LoraConfig(rank=rank, alpha=alpha)
    base, dit = weights(base_dit()), adapted(config, trained=True)
    whole = merged(base, learning(dit), scale=config.scale, where="a test")
    assert list(whole) == list(base)
    frozen = frozen_part(base, learning(dit))
    assert PATCH_KEY not in frozen and torch.equal(whole["proj_out.weight"], base["proj_out.weight"])
    plain = base_dit()
    plain.load_state_dict(whole)
    given = inputs()
    expected, found = velocity(dit, **given), velocity(plain, **given)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - velocity(base_dit(), **given)).norm() > 1e-3 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("also_train", [None, ("patch_embedding", "proj_out", "blocks.0.norm2")])
def test_peft_loads_the_folder_and_merges_it_to_our_weights(tmp_path: Path, also_train: tuple[str, ...] | None) -> None:
    from peft import PeftModel

    config = LoraConfig(rank=3, alpha=12, also_train=also_train)
    dit = adapted(config, trained=True)
    trained = {name: p.detach() for name, p in learning(dit).items()}
    write_adapter(tmp_path, trained, config)
    loaded: Any = PeftModel.from_pretrained(base_dit(), str(tmp_path))
    assert torch.allclose(velocity(loaded, **inputs()), velocity(dit, **inputs()), atol=1e-5)
    theirs = loaded.merge_and_unload().state_dict()
    ours = merged(weights(base_dit()), trained, scale=config.scale, where="a test")
    assert all(torch.allclose(theirs[name], tensor, atol=1e-6) for name, tensor in ours.items())


@torch.no_grad()
def test_diffusers_loads_the_folder_with_its_scale(tmp_path: Path) -> None:
    config = LoraConfig(rank=3, alpha=12)
    dit = adapted(config, trained=True, injected=False)
    write_adapter(tmp_path, {name: p.detach() for name, p in learning(dit).items()}, config)
    loaded = base_dit(injected=False)
    loaded.load_lora_adapter(tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors")
    assert torch.allclose(velocity(loaded, **inputs()), velocity(dit, **inputs()), atol=1e-5)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["r"] == 3 and told["lora_alpha"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("to_x",)}, "'to_x', which fits no layer of the DiT; known: attn1.to_k"),
        ({"targets": ("norm2",)}, "fits blocks.0.norm2, which is not linear"),
        ({"targets": ("patch_embedding",)}, "fits patch_embedding, which is not linear"),
        ({"also_train": ("nothing",)}, "'nothing', which matches no module"),
        ({"also_train": ("attn1", "patch_embedding")}, "is one of lora.targets; remove one"),
        ({"also_train": ()}, "would stay so; add patch_embedding"),
    ],
)
def test_what_cannot_learn_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        add_lora(base_dit(), LoraConfig(rank=2, **options), seed=0)
    assert "\n" not in str(refusal.value)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"lora\.dropout is 0\.1; only 0"):
        LoraConfig(dropout=0.1)


def test_adapters_of_another_dit_are_not_merged() -> None:
    trained = learning(adapted(LoraConfig(rank=2)))
    base = weights(base_dit())
    with pytest.raises(WeightsError, match="does not fit"):
        merged({n: t for n, t in base.items() if "to_q" not in n}, trained, scale=1.0, where="x")
    half = {n: t for n, t in trained.items() if not n.endswith("ffn.net.2.lora_B.weight")}
    with pytest.raises(WeightsError, match="2 missing"):
        merged(base, half, scale=1.0, where="x")
