"""Whole runs in one process: their files, their refusals and their ends."""

import errno
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import NanFrom, SignalAt, losses, rows, start
from seals import rewrite

from flowmask.models.errors import CacheError, CheckpointError, ConfigError, TrainingError, UserError, WeightsError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.trainer.predict.weights import content_sha256, load_dit, load_mask_decoder
from flowmask.trainer.state import checkpoint_write
from flowmask.trainer.state.checkpoint import read_full, read_state
from flowmask.trainer.state.steps import complete

ROW_KEYS = {
    *("step", "epoch", "loss", "lr", "grad_norm", "batch", "world_size", "time", "examples_per_s"),
    "data_wait_pct",
}


@pytest.fixture(scope="module")
def finished(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 undisturbed steps; `copies` start from the same config."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert start(lab, out) == 0
    return out


def test_a_run_leaves_its_config_rows_log_and_checkpoints(finished: Path) -> None:
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(1, 11))
    assert all(row.keys() >= ROW_KEYS and row["world_size"] == 1 for row in found)
    assert found[0]["epoch"] == 0.5 and found[4]["epoch"] == 2.5  # 8 examples in a view are two batches
    assert [path.name for path in complete(finished / "checkpoints")] == ["step_00000010", "step_00000009"]
    assert (finished / "checkpoints" / "latest").resolve().name == "step_00000010"
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["train"]["schedule_steps"] == 10 and config["train"]["lr"] == 2e-3
    log = (finished / "log.txt").read_text()
    line = r"step {2}5/10  epoch 2\.50  loss \d\.\d+  lr 0\.002  grad norm .*  [\d.]+ samples/s  data wait \d+ %"
    assert re.search(line, log) and "\x1b" not in log and "\r" not in log
    assert losses(finished)[-1] < losses(finished)[0]


def test_a_finished_run_says_so_and_more_steps_continue_it_on_the_first_schedule(
    lab: Path, tmp_path: Path, finished: Path
) -> None:
    cosine = {"train.schedule": "cosine", "train.steps": 4}
    out = tmp_path / "run"
    start(lab, out, cosine)
    before = (out / "metrics.jsonl").read_bytes()
    assert start(lab, out, cosine) == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "is finished: step 4 of 4" in (out / "log.txt").read_text()
    assert start(lab, out, cosine | {"train.steps": 6, "train.micro_batch": 4}) == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    assert [row["lr"] for row in rows(out)][4:] == [0.0, 0.0]
    assert [row["batch"] for row in rows(out)] == [row["batch"] for row in rows(finished)][:6]


def test_the_saved_config_repeats_the_run_to_the_bit(lab: Path, tmp_path: Path, finished: Path) -> None:
    from flowmask.trainer.config import RunConfig
    from flowmask.trainer.run.train import run

    tree = yaml.safe_load((finished / "config.yaml").read_text()) | {"out": str(tmp_path / "again")}
    run(RunConfig.model_validate(tree))
    assert losses(tmp_path / "again") == losses(finished)
    old, new = (path / "checkpoints" / "latest" for path in (finished, tmp_path / "again"))
    assert content_sha256(read_full(old)) == content_sha256(read_full(new))


def test_a_signal_saves_at_the_next_boundary_asks_for_a_requeue_and_costs_nothing(
    lab: Path, tmp_path: Path, finished: Path
) -> None:
    with SignalAt.on_every_run():
        assert start(lab, tmp_path / "run") == REQUEUE_EXIT_CODE
    assert complete(tmp_path / "run" / "checkpoints")[0].name == "step_00000005"
    assert start(lab, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(finished)


def test_steps_without_a_finite_loss_are_skipped_and_named_and_training_goes_on(lab: Path, tmp_path: Path) -> None:
    with NanFrom.on_every_run():
        assert start(lab, tmp_path / "run") == 0
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if row.get("skipped")] == [5, 6, 7]
    assert [row["step"] for row in found if row["loss"] is None or row["grad_norm"] is None] == [5, 6, 7]
    assert re.search(
        r"step 5 skipped: loss not finite; .*\(1 so far, 1 in a row\); examples \d+, \d+", _log(tmp_path / "run")
    )
    assert read_state(complete(tmp_path / "run" / "checkpoints")[0])["updates"] == 7
    assert "finished at step 10; 3 steps skipped: 3 loss not finite" in _log(tmp_path / "run")


def test_too_many_skips_in_a_row_stop_the_run_with_the_last_good_weights_saved(lab: Path, tmp_path: Path) -> None:
    guard = {"guard.max_consecutive_skips": 3, "checkpoint.every_steps": 2, "checkpoint.keep_last": 9}
    with (
        NanFrom.on_every_run(),
        pytest.raises(TrainingError, match=r"3 loss not finite; the last 3 steps in a row; the last good weights"),
    ):
        start(lab, tmp_path / "run", guard)
    last, *_, good, _ = complete(tmp_path / "run" / "checkpoints")
    assert (last.name, good.name) == ("step_00000007", "step_00000004")
    assert content_sha256(read_full(last, kind="master")) == content_sha256(read_full(good, kind="master"))
    assert content_sha256(read_full(last)) == content_sha256(read_full(good))
    assert start(lab, tmp_path / "run", guard) == 0


def test_a_full_disk_costs_a_save_but_not_the_run_until_the_last_one_which_says_so_in_one_line(
    lab: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {3, 10}
    real = checkpoint_write.save_file

    def full(tensors: Any, path: Path) -> None:
        if int(path.parent.name.split("_")[2]) in refused:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint_write, "save_file", full)
    with pytest.raises(CheckpointError, match=r"of step 10: .*No space left on device; earlier checkpoints are kept"):
        start(lab, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in complete(checkpoints)] == ["step_00000009", "step_00000006"]
    assert "step 3 could not be written: [Errno 28] No space left" in _log(tmp_path / "run")
    refused.clear()
    assert start(lab, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(finished)


def test_what_does_not_shape_the_training_may_change_on_a_resume(lab: Path, tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    harmless = {
        "train.log_every_steps": 1,
        "train.collective_timeout_s": 60.0,
        "checkpoint.milestone_every_steps": 11,
        "guard.max_consecutive_skips": 2,
        "evaluate.every_steps": 6,
    }
    assert start(lab, run, {"train.steps": 12} | harmless) == 0
    assert losses(run)[:10] == losses(finished) and len(losses(run)) == 12
    assert "step_00000011" in [path.name for path in complete(run / "checkpoints")]


def test_other_frozen_weights_under_a_run_are_refused(lab: Path, tmp_path: Path, finished: Path) -> None:
    import shutil

    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    state = complete(run / "checkpoints")[0] / "state.json"
    other = {"parameters": 3, "sha256": "0" * 64}
    rewrite(state, lambda document: document["state"].update(frozen=other))
    with pytest.raises(CheckpointError, match="trained on other frozen weights"):
        start(lab, run, {"train.steps": 12})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.lr": 1e-3}, r"another config: train\.lr: 0\.002 -> 0\.001\."),
        (
            {"train.seed": 1, "objective.boundary_bias": False},
            r"objective\.boundary_bias: True -> False; train\.seed: 0 -> 1\.",
        ),
        ({"train.schedule_steps": 20}, r"train\.schedule_steps: 10 -> 20"),
    ],
)
def test_a_resume_that_would_change_the_training_is_refused_field_by_field(
    lab: Path, finished: Path, overrides: dict[str, Any], message: str
) -> None:
    before = _files(finished)
    with pytest.raises(CheckpointError, match=message):
        start(lab, finished, {"train.steps": 12} | overrides)
    assert _files(finished) == before


def test_a_cache_may_move_but_not_change_under_a_run(lab: Path, finished: Path, tmp_path: Path) -> None:
    import shutil

    from runs import cache_settings

    from flowmask.data_pipeline.build.build import build
    from flowmask.data_pipeline.config import CacheBuildConfig

    moved = shutil.copytree(lab / "cache", tmp_path / "moved")
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    assert start(lab, run, {"train.steps": 11, "data.cache": str(moved)}) == 0
    other = cache_settings(lab) | {"out": tmp_path / "other"}
    other["cache"] = other["cache"] | {"seed": 5}
    build(CacheBuildConfig.model_validate(other))
    with pytest.raises(CheckpointError, match=r"another cache: cache\.seed: 0 -> 5"):
        start(lab, run, {"train.steps": 12, "data.cache": str(tmp_path / "other")})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"data.cache": "/nowhere"}, CacheError, "/nowhere: no such cache"),
        ({"model.wan": "/nowhere"}, WeightsError, "/nowhere is not a folder"),
        (
            {"objective.kind": "gan"},
            ConfigError,
            "'gan'; known: flow_matching, light_mask_decoder, mask_decoder, text_to_video",
        ),
        ({"model.init": "/nowhere"}, WeightsError, "/nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(
    lab: Path, tmp_path: Path, overrides: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        start(lab, tmp_path / "run", overrides)
    assert "\n" not in str(caught.value)
    assert start(lab, tmp_path / "run", {"train.steps": 1}) == 0


def test_starting_from_weights_is_a_fresh_run_that_records_them(lab: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start(lab, out, {"model.init": str(finished), "train.steps": 2}) == 0
    state = read_state(complete(out / "checkpoints")[0])
    taken = load_dit(str(finished))
    assert state["state"]["init"] == {"source": str(finished), "ema": True, "sha256": taken.sha256}
    assert state["updates"] == state["ema_updates"] == 2
    assert losses(out)[0] < losses(finished)[0]
    with pytest.raises(WeightsError, match=r"other settings: mask_latent_norm none there, video here"):
        start(lab, tmp_path / "b", {"model.init": str(finished), "model.mask_latent_norm": "video"})
    with pytest.raises(WeightsError, match="trained flow_matching, but weights of mask_decoder"):
        start(lab, tmp_path / "c", {"model.init": str(finished), "objective.kind": "mask_decoder"})


def test_the_mask_decoder_learns_under_the_same_trainer(lab: Path, tmp_path: Path) -> None:
    decoder = {"objective.kind": "mask_decoder", "objective.latent_noise_std": 0.1, "train.precision": "fp32"}
    assert start(lab, tmp_path / "run", decoder | {"train.steps": 12}) == 0
    found = rows(tmp_path / "run")
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    expected = 8 * found[0]["focal"] + 4 * found[0]["dice"]
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(load_mask_decoder(str(tmp_path / "run")).state_dict) >= {"decoder.conv_out.weight"}


def _log(out: Path) -> str:
    return (out / "log.txt").read_text()


def _files(folder: Path) -> dict[str, str]:
    """Content hashes of a folder's files, without the lock, the log and the owner."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    kept = [path for path in paths if path.name not in (".lock", "log.txt", ".owner.json")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def test_a_cache_whose_statistics_are_not_those_of_the_vae_is_refused(lab: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(lab / "cache", tmp_path / "cache")
    more = [1.0 + mean for mean in json.loads((cache / "manifest.json").read_text())["latents_mean"]]
    rewrite(cache / "manifest.json", lambda manifest: manifest.update(latents_mean=more))
    with pytest.raises(CacheError, match="latents_mean and latents_std are not those of the VAE"):
        start(lab, tmp_path / "run", {"data.cache": str(cache), "train.steps": 1})
