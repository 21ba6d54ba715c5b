"""Text to video: the path goes from noise to the video, without a mask; a run becomes a Wan2.1 folder."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_lab import STATS, batch_of, make
from pydantic import ValidationError
from runs import run_config, start
from torch import Tensor

from flowmask.models.errors import UserError
from flowmask.models.vae import normalise
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.parts import VIDEO_DIT
from flowmask.trainer.predict.weights import load, load_dit

T2V = {"objective": {"kind": "text_to_video"}}


class KnowsTheVideo:
    """Stands for a DiT that knows the video of each example; its only input has 16 channels."""

    patch_embedding = SimpleNamespace(weight=torch.zeros(1), in_channels=16)

    def __init__(self, video: Tensor) -> None:
        self.video, self.seen = video, list[Tensor]()

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        self.seen.append(hidden_states)
        return ((hidden_states - self.video) / (timestep / 1000).view(-1, 1, 1, 1, 1),)


def test_whoever_knows_the_video_has_no_loss_and_at_the_end_of_t_there_is_noise_alone() -> None:
    objective = make("text_to_video")
    batch = objective.prepare(batch_of([1, 2, 3, 4], shape=(16, 4, 8, 8)))
    video = normalise(STATS, batch.video_mean)
    batch.mask_mean = batch.video_logvar = None
    batch.draws["timestep"] = torch.tensor([10, 400, 999, 1000])
    dit = KnowsTheVideo(video)
    assert objective.loss(dit, batch)[0] < 1e-6
    noise = dit.seen[0][3]
    assert abs(noise.mean()) < 0.08 and abs(noise.std() - 1) < 0.08
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), video[3].flatten()]))[0, 1]) < 0.1


def test_every_timestep_is_as_likely_as_any_other() -> None:
    drawn = make("text_to_video").prepare(batch_of(list(range(20_000)))).draws["timestep"]
    counts = torch.bincount((drawn - 1) // 100, minlength=10)
    assert drawn.min() >= 1 and drawn.max() <= 1000
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()


def test_its_run_becomes_a_wan_folder_from_which_masks_are_learned(lab: Path, tmp_path: Path) -> None:
    run, wan = tmp_path / "video", tmp_path / "wan"
    assert (
        start(lab, run, {**T2V, "train.steps": 4, "evaluate": {"every_steps": 2, "examples": 2, "jf_examples": 0}}) == 0
    )
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 2
    export(str(run), format="diffusers", out=wan)
    trained = load(str(run), VIDEO_DIT, ema=True).state_dict
    found = WanFolder(wan).transformer(video_injection=False).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items()) and found.keys() == trained.keys()
    before = WanFolder(lab / "wan")
    assert all(WanFolder(wan).identity(part) == before.identity(part) for part in ("vae", "text_encoder", "tokenizer"))
    assert WanFolder(wan).identity("transformer") != before.identity("transformer")
    assert start(lab, tmp_path / "masks", {"model.wan": str(wan), "train.steps": 2}) == 0


@pytest.mark.parametrize("format", ["flowrvs", "safetensors", "lora"])
def test_it_is_no_dit_that_segments(lab: Path, tmp_path: Path, format: str) -> None:
    run = tmp_path / "video"
    assert start(lab, run, {**T2V, "train.steps": 1}) == 0
    with pytest.raises(UserError, match="trained text_to_video, but weights of dit are needed"):
        load_dit(str(run))
    with pytest.raises(UserError, match="--format diffusers"):
        export(str(run), format=format, out=tmp_path / f"x{'.pth' if format == 'flowrvs' else '.safetensors'}")
    export(str(run), format="diffusers", out=tmp_path / "wan")
    with pytest.raises(UserError, match=r"is a Wan2\.1 folder, whose DiT was not trained to segment"):
        load_dit(str(tmp_path / "wan"))


def test_an_evaluation_on_the_way_has_no_mask_to_score() -> None:
    with pytest.raises(ValidationError, match=r"evaluate\.jf_examples is 8, but .* makes no masks; set it to 0"):
        run_config(Path("lab"), Path("out"), {**T2V, "evaluate": {"every_steps": 2}})
