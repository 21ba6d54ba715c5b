"""Other paths of the paper: from noise, direct prediction of the mask, random weights; the defaults change nothing."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from objective_lab import STATS, batch_of, make
from pydantic import ValidationError
from runs import run_config, start
from torch import Tensor

from flowmask.models.config import SamplerConfig
from flowmask.models.errors import ConfigError
from flowmask.models.flow import start_noise
from flowmask.models.segment import SegmentSettings, sample_mask
from flowmask.models.vae import denormalise, normalise
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.conventions import segment_settings
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.weights import load_dit

NOISE = {"start": "noise", "start_point_augmentation": False}
PATHS = [{**start, "predicts": predicts} for start, predicts in product([{}, NOISE], ["velocity", "mask"])]


class KnowsTheEnd:
    """Stands for a DiT that knows the mask of each example, and gives the requested output."""

    patch_embedding = SimpleNamespace(weight=torch.zeros(1), in_channels=32)

    def __init__(self, end: Tensor, *, predicts: str) -> None:
        self.end, self.predicts, self.seen = end, predicts, list[Tensor]()

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        x_t, video = hidden_states.chunk(2, dim=1)
        self.seen.append(video)
        t = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return ((x_t - self.end) / t if self.predicts == "velocity" else self.end,)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("norm", ["none", "video"])
def test_whoever_knows_the_mask_has_no_loss_and_sampling_ends_on_it(path: dict[str, Any], norm: str) -> None:
    objective = make(mask_latent_norm=norm, **path)
    batch = objective.prepare(batch_of([1, 2, 3], shape=(16, 2, 2, 3)))
    batch.draws["timestep"] = torch.tensor([30, 400, 1000])
    mask = normalise(STATS, batch.mask_mean) if norm == "video" else batch.mask_mean
    dit = KnowsTheEnd(mask, predicts=path["predicts"])
    assert objective.loss(dit, batch)[0] < 1e-8

    video = normalise(STATS, batch.video_mean)
    for steps, shift in ((1, 3.0), (2, 1.0), (7, 5.0)):
        settings = segment_settings(objective.settings(), sampler=SamplerConfig(steps=steps, shift=shift))
        found = sample_mask(cast(Any, dit), video_latent=video, text=batch.text, settings=settings, stats=STATS)
        torch.testing.assert_close(found, denormalise(STATS, mask) if norm == "video" else mask, atol=2e-5, rtol=1e-5)
        assert torch.equal(dit.seen[-1], video)


def test_noise_carries_nothing_of_the_video_and_follows_from_the_key() -> None:
    class Asked(KnowsTheEnd):
        def __call__(self, *, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            self.seen.append(hidden_states[:, :16])
            return (hidden_states[:, :16],)

    objective, points = make(**NOISE), []
    for keys in ([1, 2, 3], [3, 1]):
        batch = objective.prepare(batch_of(keys, shape=(16, 2, 4, 4)))
        batch.draws["timestep"] = torch.full((len(keys),), 1000)
        objective.loss(dit := Asked(batch.mask_mean, predicts="mask"), batch)
        points.append(dit.seen[0])
    assert torch.equal(points[1], points[0][[2, 0]])
    flat, video = points[0].flatten(), batch_of([1, 2, 3], shape=(16, 2, 4, 4)).video_mean.flatten()
    assert abs(flat.mean()) < 0.06 and abs(flat.std() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([flat, video]))[0, 1]) < 0.1


def test_sampling_from_noise_starts_at_the_same_noise_alone_and_in_company() -> None:
    class Still(KnowsTheEnd):
        def __call__(self, *, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
            return (torch.zeros_like(hidden_states[:, :16]),)

    settings, still = SegmentSettings(SamplerConfig(steps=3), start="noise"), Still(torch.zeros(1), predicts="")
    for video in (torch.ones(1, 16, 2, 4, 6), torch.zeros(3, 16, 2, 4, 6)):
        text = torch.zeros(len(video), 4, 8)
        found = sample_mask(cast(Any, still), video_latent=video, text=text, settings=settings, stats=STATS)
        assert all(torch.equal(one, start_noise((16, 2, 4, 6))) for one in found)
    assert abs(start_noise((16, 9, 8, 8)).std() - 1) < 0.02


def test_the_defaults_record_nothing_and_other_paths_record_themselves() -> None:
    assert make().settings().keys() == {"objective", "text_tokens", "mask_latent_norm", "video_injection"}
    told = make(**NOISE, predicts="mask").settings()
    assert (told["start"], told["predicts"]) == ("noise", "mask")
    ours = segment_settings(make().settings(), sampler=SamplerConfig())
    assert (ours.start, ours.predicts) == ("video", "velocity")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": {"start": "noise", "start_point_augmentation": False, "video_injection": False}}, "injection"),
        ({"objective": {"start": "noise"}}, "start_point_augmentation=false"),
        ({"objective": {"weights_seed": 1}, "model.init": "runs/x"}, "model.init is runs/x"),
        ({"objective": {"weights_seed": 1}, "lora": {"rank": 2}}, "lora"),
        ({"objective": {"weights_seed": -1}}, "weights_seed"),
    ],
)
def test_what_contradicts_a_path_is_refused_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=said):
        run_config(Path("lab"), Path("out"), changes)


def test_random_weights_follow_from_their_seed_and_leave_the_processes_own_draws_alone(lab: Path) -> None:
    def weights(seed: int | None) -> dict[str, Tensor]:
        torch.manual_seed(9)
        before = torch.random.get_rng_state()
        state = make(wan=lab / "wan", weights_seed=seed).build().state_dict()
        assert torch.equal(torch.random.get_rng_state(), before)
        return dict(state)

    one, again, other, wan = weights(1), weights(1), weights(2), weights(None)
    assert all(torch.equal(one[name], again[name]) for name in wan) and one.keys() == wan.keys()
    assert all((one[name].shape, one[name].dtype) == (t.shape, t.dtype) for name, t in wan.items())
    drawn = [name for name in wan if not torch.equal(one[name], other[name])]
    assert {"patch_embedding.weight", "scale_shift_table", "blocks.0.attn1.to_q.weight"} <= {*drawn}
    assert not any(torch.equal(one[name], wan[name]) for name in drawn)
    assert all(t.isfinite().all() for t in one.values())
    rope = WanFolder(lab / "wan").transformer(video_injection=True).rope
    built = make(wan=lab / "wan", weights_seed=1).build().rope
    assert all(torch.equal(a, b) for a, b in zip(rope.buffers(), built.buffers(), strict=True))


def test_weights_of_another_path_remember_it_in_every_export_but_the_one_that_cant(lab: Path, tmp_path: Path) -> None:
    path = {"kind": "flow_matching", **NOISE, "predicts": "mask", "weights_seed": 4}
    run = tmp_path / "run"
    assert start(lab, run, {"objective": path, "train.steps": 2, "evaluate": {"every_steps": 2, "examples": 2}}) == 0
    known = {"start": "noise", "predicts": "mask"}
    for source in (run, *(export(str(run), format=kind, out=tmp_path / out).path for kind, out in EXPORTS)):
        assert known.items() <= load_dit(str(source)).settings.items(), source
    with pytest.raises(ConfigError, match=r"start noise, predicts mask.*FlowRVS's code does not support; use "):
        export(str(run), format="flowrvs", out=tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


EXPORTS = (("diffusers", "folder"), ("safetensors", "one.safetensors"))
