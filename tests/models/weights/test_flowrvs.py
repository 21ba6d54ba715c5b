"""Published FlowRVS files load safely and strictly, and each tensor of their EMA list gets its name."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowmask.models.dit import PATCH_KEY
from flowmask.models.errors import WeightsError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.weights import flowrvs

GOLDEN = Path(__file__).parents[2] / "golden" / "parity"


@pytest.fixture(params=["dit_dvi", "dit_plain"])
def weights(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return load_file(GOLDEN / request.param / "weights.safetensors")


def trained(weights: dict[str, Tensor], order: list[str]) -> dict[str, object]:
    """The content of a training file; the EMA weights are the weights plus one, in the reference's order."""
    return {
        "model": weights,
        "ema_model": {"decay": 0.9999, "shadow_params": [weights[name] + 1 for name in order]},
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-5}]},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "args": argparse.Namespace(lr=5e-5, use_dvi=True),
    }


def recorded_order(case: str = "dit_dvi") -> list[str]:
    return json.loads((GOLDEN / case / "param_order.json").read_text())["reference"]


def save(content: object, path: Path) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("case", ["dit_dvi", "dit_plain"])
def test_the_reference_order_follows_from_the_names_in_any_order(case: str) -> None:
    order = recorded_order(case)
    assert flowrvs.reference_order(sorted(order)) == order
    assert flowrvs.reference_order(reversed(order)) == order


def test_ema_weights_reach_the_names_that_they_were_averaged_from(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = save(trained(weights, recorded_order()), tmp_path / "dit.pth")
    plain, settings = flowrvs.load_dit(path, ema=False)
    averaged, _ = flowrvs.load_dit(path, ema=True)
    assert settings == {"video_injection": weights[PATCH_KEY].shape[1] == 32}
    assert plain.keys() == averaged.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(plain[name], tensor) and torch.equal(averaged[name], tensor + 1), name


def test_bfloat16_files_and_zip_files_load_as_float32(weights: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    torch.save({"model": half}, tmp_path / "dit.pth")
    loaded, _ = flowrvs.load_dit(tmp_path / "dit.pth", ema=False)
    assert all(torch.equal(loaded[name], half[name].float()) for name in half)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_state_dict_alone_is_a_file_without_averaged_weights(
    weights: dict[str, Tensor], zipped: bool, tmp_path: Path
) -> None:
    for number, content in enumerate((weights, {"model": weights}, {"model": weights, "ema_model": None})):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for ema in (False, True):
            loaded, settings = flowrvs.load_dit(path, ema=ema)
            assert loaded.keys() == weights.keys() and all(torch.equal(loaded[n], weights[n]) for n in weights)
            assert (flowrvs.NOT_AVERAGED in settings) == ema


DAMAGES = {
    "no model": (lambda c: c.pop("model"), "`model` is missing"),
    "missing key": (lambda c: c["model"].pop("proj_out.bias"), "1 missing (proj_out.bias)"),
    "unexpected key": (lambda c: c["model"].update(extra=torch.ones(1)), "1 unexpected (extra)"),
    "reshaped key": (lambda c: c["model"].update({"proj_out.bias": torch.ones(3)}), "1 reshaped (proj_out.bias"),
    "consistently reshaped": (
        lambda c: (
            c["model"].update({"blocks.0.norm2.bias": torch.ones(3)}),
            c["ema_model"]["shadow_params"].__setitem__(recorded_order().index("blocks.0.norm2.bias"), torch.ones(3)),
        ),
        "1 reshaped (blocks.0.norm2.bias",
    ),
    "ema too short": (lambda c: c["ema_model"]["shadow_params"].pop(), "68 tensors, the model 69"),
    "ema in another order": (lambda c: c["ema_model"]["shadow_params"].reverse(), "reshaped"),
    "no list of ema": (lambda c: c["ema_model"].pop("shadow_params"), "ema=false"),
    "not tensors": (lambda c: c["model"].update(extra=3), "no tensors (extra)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    content = trained(load_file(GOLDEN / "dit_dvi" / "weights.safetensors"), recorded_order())
    change, said = DAMAGES[damage]
    change(content)
    with pytest.raises(WeightsError) as refusal:
        flowrvs.load_dit(save(content, tmp_path / "dit.pth"), ema=True)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


class Trap:
    """It writes a folder when it is unpickled without protection."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("load", [flowrvs.load_dit, flowrvs.load_mask_decoder])
def test_a_malicious_pickle_is_refused_and_executes_nothing(load: object, zipped: bool, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "trap.pth"
    torch.save({"model": {}, "args": Trap(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"mkdir.*refused") as refusal:
        load(path, ema=True)
    assert not target.exists() and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"\x80\x02"])
def test_a_damaged_or_missing_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    with pytest.raises(WeightsError, match="does not exist"):
        flowrvs.load_dit(path, ema=True)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cut\.pth") as refusal:
        flowrvs.load_dit(path, ema=True)
    assert "\n" not in str(refusal.value)


def test_a_file_cut_short_is_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = save({"model": weights}, tmp_path / "dit.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match="damaged") as refusal:
        flowrvs.load_dit(path, ema=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_a_mask_decoder_file_gives_its_decoder_and_its_encoder(bare: bool, wrapped: bool, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    state = load_file(GOLDEN / "mask_decoder" / "weights.safetensors")
    names = {key.removeprefix("vae.") if bare else key: tensor for key, tensor in state.items()}
    path = save({"model": names} if wrapped else names, tmp_path / "decoder.pth")
    decoder, settings = flowrvs.load_mask_decoder(path)
    encoder = flowrvs.load_encoder(path)
    assert settings == {} and len(decoder) + len(encoder) == len(state)
    vae = AutoencoderKLWan(**json.loads((GOLDEN / "mask_decoder" / "config.json").read_text()))
    module = MaskDecoder.from_vae(vae).load(decoder, where=path)
    assert all(torch.equal(module.state_dict()[name], state[f"vae.{name}"]) for name in decoder)
    vae.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in encoder.items() if k[0] == "e"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update(stranger=torch.ones(1)), r"1 keys .* \(stranger\)"),
        (lambda s: s.update({"vae.decoder.conv_out.weight": torch.ones(3, 8, 3, 3, 3)}), "3 channels"),
        (lambda s: s.pop("vae.decoder.conv_out.weight"), "no channels"),
        (lambda s: s.clear(), "no channels"),
    ],
)
def test_a_mask_decoder_file_of_another_kind_is_refused(change: object, said: str, tmp_path: Path) -> None:
    state = load_file(GOLDEN / "mask_decoder" / "weights.safetensors")
    change(state)
    with pytest.raises(WeightsError, match=said):
        flowrvs.load_mask_decoder(save(state, tmp_path / "decoder.pth"))
