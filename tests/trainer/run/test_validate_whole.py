"""Whole videos while training: the numbers of `flowmask evaluate`, and no effect on the training."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import GOLDEN, losses, run_config, run_group, start, unequal_tensors

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.plan.leaks import refuse_trained_on
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.data_pipeline.sources import open_source
from flowmask.models.errors import CheckpointError, DataError, UserError
from flowmask.models.process import REQUEUE_EXIT_CODE
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.inference import mask_decoder_named
from flowmask.trainer.run.validate_whole import WholeVideos
from flowmask.trainer.run.validate_whole_start import chosen, whole_videos_of
from flowmask.trainer.score.evaluate import evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.state.checkpoint import read_state

CHEAP = {"evaluate.every_steps": 5, "evaluate.examples": 2, "evaluate.jf_examples": 1, "evaluate.overlays": 0}
SHORT = {"train.precision": "fp32", "train.micro_batch": 1, "train.steps": 3}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three videos that are in no cache."""
    root = tmp_path_factory.mktemp("held")
    folder = shutil.copytree(GOLDEN / "valid_u", root / "valid_u")
    videos = json.loads((folder / "meta_expressions.json").read_text())["videos"]
    named = {"h0": "vidA", "h1": "vidB", "h2": "vidA"}
    for new, old in named.items():
        shutil.copytree(folder / "JPEGImages" / old, folder / "JPEGImages" / new)
    for old in videos:
        shutil.rmtree(folder / "JPEGImages" / old)
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": {n: videos[o] for n, o in named.items()}}))
    return root


def whole(held: Path, **more: Any) -> dict[str, Any]:
    """The overrides of a run that is also evaluated on whole videos."""
    data = {"source": "mevis", "root": str(held), "split": "valid_u"}
    return CHEAP | {"evaluate.whole_videos": {"data": data, "protocol": "mevis", **more}}


def found(run: Path) -> dict[int, dict[str, float]]:
    """The numbers of whole videos by step, for steps that have them."""
    every = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    numbers = {row["step"]: {k.removeprefix("eval_whole_"): v for k, v in row.items() if "whole" in k} for row in every}
    return {step: some for step, some in numbers.items() if some}


def evaluated(run: Path, held: Path, out: Path, **changes: Any) -> dict[str, float]:
    """The numbers of `flowmask evaluate` for a checkpoint, limited to those that training shows."""
    data = {"source": "mevis", "root": held, "split": "valid_u"}
    given = {"out": out, "checkpoint": str(run), "data": data, "device": "cpu", "protocol": "mevis"} | changes
    scores = evaluate(EvaluateConfig.model_validate(given))
    assert scores is not None and scores.protocol is not None
    table = scores.protocol["tables"][scores.protocol["convention"]]["all"]
    every = scores.totals | scores.nothing | {f"mevis_{name}": value for name, value in table.items()}
    return {name: value for name, value in every.items() if value is not None}


@pytest.fixture(scope="module")
def run(lab: Path, held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 with whole videos only at its last step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    short = {"train.steps": 4, "evaluate.every_steps": 2, "evaluate.best": "eval_whole_jf"}
    assert start(lab, out, whole(held, every_steps=4) | short) == 0
    return out


def test_the_numbers_are_those_of_an_evaluation_of_the_same_checkpoint(run: Path, held: Path, tmp_path: Path) -> None:
    assert found(run) == {4: evaluated(run, held, tmp_path / "e")}
    assert found(run)[4]["jf"] > 0 and "mevis_jf" in found(run)[4]
    log = (run / "log.txt").read_text()
    assert f"evaluating on 3 whole videos of {held} (valid_u)" in log and "whole jf " in log


def test_the_best_may_follow_them_and_is_not_chosen_by_evaluations_without(run: Path) -> None:
    marks = {row["step"]: row["best"] for row in map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())}
    assert marks == {2: False, 4: True}
    state = read_state((run / "checkpoints" / "best").resolve())
    best = state["state"]["best"]
    assert state["step"] == 4 and best["metric"] == "eval_whole_jf" and best["value"] == found(run)[4]["jf"]
    assert best["definition"]["best"] == "eval_whole_jf"
    assert {"box", "sampler", "protocol", "dataset", "videos", "mask_decoder"} == best["definition"][
        "whole_videos"
    ].keys()


def test_a_stop_on_the_way_costs_no_number_at_any_number_of_ranks_and_no_bit_of_the_training(
    lab: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, early = WholeVideos._attempt, whole(held) | {"evaluate.every_steps": 2}

    def stopped(self: WholeVideos, loaded: Any, place: int) -> Any:
        if place == 0:
            signal.raise_signal(signal.SIGTERM)
        assert place == 0, "no further video after a stop"
        return attempt(self, loaded, place)

    monkeypatch.setattr(WholeVideos, "_attempt", stopped)
    assert start(lab, tmp_path / "one", SHORT | early) == REQUEUE_EXIT_CODE
    monkeypatch.undo()
    assert (tmp_path / "one" / "evaluations.jsonl").read_text() == ""
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    numbers = evaluated(tmp_path / "two", held, tmp_path / "e", precision="fp32")
    job = {"lab": str(lab), "out": str(tmp_path / "two"), "overrides": SHORT | early}
    run_group([job], folder=tmp_path / "logs")
    for name, overrides in (("one", early), ("never", {})):
        assert start(lab, tmp_path / name, SHORT | overrides) == 0
    assert found(tmp_path / "one") == found(tmp_path / "two") == {2: numbers}
    assert losses(tmp_path / "one") == losses(tmp_path / "never")
    assert unequal_tensors(tmp_path / "never", tmp_path / "one") == []


def test_adapters_that_are_not_merged_give_the_numbers_of_merged_ones(lab: Path, held: Path, tmp_path: Path) -> None:
    adapters = {"lora": {"rank": 2}, "train.steps": 2, "train.lr": 1e-2, "evaluate.every_steps": 2}
    assert start(lab, tmp_path / "run", SHORT | whole(held) | adapters) == 0
    merged = evaluated(tmp_path / "run", held, tmp_path / "e", precision="fp32")
    assert found(tmp_path / "run")[2] == pytest.approx(merged, abs=2.0)  # a pixel at the threshold may flip


def scorer(say: Any) -> WholeVideos:
    """Three videos in one process, without models."""
    data = {"root": "d", "split": "valid_u"}
    config = EvaluateConfig.model_validate({"out": "o", "checkpoint": "c", "data": data})
    videos = [SimpleNamespace(video_id=f"v{n}") for n in range(3)]
    return WholeVideos(config, videos, {}, None, {}, say)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [CheckpointError("logits that are not finite"), OSError("stale file handle")])
def test_a_video_that_cannot_be_scored_is_a_line_and_the_training_goes_on_without_the_numbers(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(self: WholeVideos, loaded: Any, place: int) -> dict[str, Any]:
        if place == 1:
            raise error
        return {}

    said: list[str] = []
    monkeypatch.setattr(WholeVideos, "_record", record)
    monkeypatch.setattr(WholeVideos, "_loaded", lambda self, dit: nullcontext(object()))
    assert scorer(said.append).measure(torch.nn.Identity(), stop=lambda: False) == {}
    assert len(said) == 1 and str(error) in said[0] and "the training continues" in said[0]


def broken(held: Path, folder: Path, what: str) -> dict[str, str]:
    """A copy of the dataset without masks, or with a damaged frame, as entries of a config."""
    root = shutil.copytree(held, folder / what)
    if what == "masks":
        (root / "valid_u" / "mask_dict.json").unlink()
    else:
        (root / "valid_u" / "JPEGImages" / "h1" / "00010.jpg").write_bytes(b"no picture")
    return {"root": str(root), "split": "valid_u"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "/nowhere"}, r"/nowhere/valid_u: no such dataset folder"),
        ({"split": "train"}, r"no such dataset folder .* holds valid_u"),
        ({"root": str(GOLDEN)}, r"2 of the 2 videos are in the training cache .*cache: vidA, vidB; .*cache.leaks=drop"),
        ("masks", r"video h0 of .* has no true masks; choose another split"),
        ("frame", r"00010.jpg"),
        ({"protocol": "refcoco"}, r"protocol is 'refcoco', which scores data.source refcoco"),
        ({"positions": 1}, r"video h0 has 6 frames; the DiT takes at most 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_training_in_one_line(
    lab: Path, held: Path, tmp_path: Path, change: Any, message: str
) -> None:
    more = broken(held, tmp_path, change) if isinstance(change, str) else dict(change)
    protocol, positions = more.pop("protocol", None), more.pop("positions", None)
    settings = {"data": {"source": "mevis", "root": str(held), "split": "valid_u", **more}, "protocol": protocol}
    config = run_config(lab, tmp_path / "run", {"evaluate.whole_videos": settings})
    if positions is not None:
        (tmp_path / "wan" / "transformer").mkdir(parents=True)
        (tmp_path / "wan" / "transformer" / "config.json").write_text(json.dumps({"rope_max_seq_len": positions}))
        config = config.model_copy(update={"model": config.model.model_copy(update={"wan": tmp_path / "wan"})})
    vae: Any = WanFolder(lab / "wan").vae()
    with pytest.raises(UserError, match=f"^evaluate.whole_videos: .*{message}") as caught:
        whole_videos_of(
            config,
            settings={"pixel_norm": "half", "lowercase": True, "text_tokens": 16},
            fields={"clip.short_side": 32, "clip.long_side": 48},
            caches=[CacheReader(lab / "cache")],
            vae=vae,
            decoder=mask_decoder_named("vae", vae),
            say=print,
        )
    assert "\n" not in str(caught.value)


def test_the_videos_are_spread_over_the_dataset_in_its_order_and_a_smaller_number_is_a_part_of_a_larger() -> None:
    every: Any = [SimpleNamespace(video_id=n, expressions=[1] * (n % 3)) for n in range(90)]
    ids = {count: [video.video_id for video in chosen(every, count)] for count in (5, 20, 100)}
    assert ids[100] == [n for n in range(90) if n % 3] and ids[20] == sorted(ids[20])
    assert len(ids[5]) == 5 and set(ids[5]) < set(ids[20]) and max(ids[20]) - min(ids[20]) > 45


def test_a_cache_that_names_its_datasets_shares_videos_with_those_of_the_same_family_alone(held: Path) -> None:
    def leaks(source: str) -> bool:
        record = {"video_id": "h0", "source": source}
        index = np.zeros(1, [("view", "u2"), ("shard", "u4"), ("record", "u8")])
        cache: Any = SimpleNamespace(place=held, index=index, record=lambda number: record)
        data = DataSourceConfig(source="mevis", root=held, split="valid_u")
        try:
            refuse_trained_on(open_source(data).videos(), data, [cache])
        except DataError:
            return True
        return False

    assert [leaks(source) for source in ("", "mevis", "my_own_name", "refcoco")] == [True, True, True, False]
