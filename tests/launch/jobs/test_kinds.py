"""Each kind of job states its name, inputs and outputs; a config of no kind is refused."""

from pathlib import Path
from typing import Any

import pytest

from flowmask.launch.config import validate
from flowmask.launch.jobs import KINDS, CacheJob, EvaluateJob, TrainJob, kind_of
from flowmask.launch.jobs.job import Job
from flowmask.models.errors import ConfigError

TREES: dict[type[Job], dict[str, Any]] = {
    TrainJob: {
        "model": {"wan": "w", "init": "runs/b"},
        "data": {"cache": "c"},
        "train": {"steps": 10, "global_batch": 32, "micro_batch": 2},
    },
    CacheJob: {"model": {"wan": "w"}, "data": {"root": "d"}},
    EvaluateJob: {"checkpoint": "runs/a", "data": {"root": "d"}},
}


def job(kind: type[Job], out: Path, **changes: Any) -> Job:
    return validate({"out": out, **TREES[kind], **changes}, kind, origin="a test")


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        ({"out": "a", "train": {}}, "train"),
        ({"out": "a", "model": {"wan": "w"}, "data": {"root": "d"}}, "cache"),
        ({"out": "a", "checkpoint": "runs/a", "data": {"root": "d"}}, "evaluate"),
        ({"out": "a", "model": {"wan": "w"}, "data": [{"root": "d"}]}, "cache"),
        ({"kind": "decoder", "train": {}}, "train"),
        ({"kind": "evaluate"}, "evaluate"),
    ],
)
def test_the_kind_of_a_job_is_told_by_its_keys(tree: dict[str, Any], kind: str) -> None:
    assert kind == kind_of(tree, origin="job.yaml")[0].KIND


@pytest.mark.parametrize(("tree", "word"), [({"out": "a"}, "add kind"), ({"kind": "trian"}, "kind is trian")])
def test_a_config_of_no_kind_is_refused_with_the_kinds(tree: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        kind_of(tree, origin="job.yaml")
    assert "evaluate" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "names", "not_these"),
    [
        (CacheJob, ["", "manifest.json"], ["shards", "manifest.json/x", "../b"]),
        (
            TrainJob,
            ["", "checkpoints/latest", "checkpoints/step_00000010"],
            ["manifest.json", "checkpoints/step_00000005", "checkpoints/best", "export"],
        ),
        (EvaluateJob, [""], ["masks", "manifest.json"]),
    ],
)
def test_a_job_will_make_what_it_leaves_and_nothing_else(
    kind: type[Job], names: list[str], not_these: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    the_job = job(kind, Path("made"))
    for place in (Path("made"), tmp_path / "made", tmp_path / "x" / ".." / "made"):
        assert all(the_job.will_make(place / name) for name in names)
        assert not any(the_job.will_make(place / name) for name in not_these)


def test_a_job_reads_what_its_config_names(tmp_path: Path) -> None:
    named = {kind: [(each.key, str(each.path)) for each in job(kind, tmp_path).inputs()] for kind in TREES}
    assert named == {
        TrainJob: [("model.wan", "w"), ("model.init", "runs/b"), ("data.cache", "c/manifest.json")],
        CacheJob: [("model.wan", "w"), ("data.root", "d")],
        EvaluateJob: [("checkpoint", "runs/a"), ("data.root", "d")],
    }
    whole = {"every_steps": 5, "whole_videos": {"data": {"root": "h"}}}
    keys = [(each.key, str(each.path)) for each in job(TrainJob, tmp_path, evaluate=whole).inputs()]
    assert set(keys) - set(named[TrainJob]) == {("evaluate.whole_videos.data.root", "h")}
    (tmp_path / "w").mkdir()
    for kind, changes, parts in (
        (TrainJob, {}, ["transformer"]),
        (TrainJob, {"evaluate": whole}, ["transformer", "vae", "text_encoder", "tokenizer"]),
        (TrainJob, {"objective": {"kind": "mask_decoder"}}, ["vae"]),
        (TrainJob, {"objective": {"kind": "light_mask_decoder"}}, []),
        (CacheJob, {}, ["vae", "text_encoder", "tokenizer"]),
    ):
        there = job(kind, tmp_path, **{**TREES[kind], **changes, "model": {"wan": tmp_path / "w"}})
        assert [each.path for each in there.inputs() if each.path.parent == tmp_path / "w"] == [
            tmp_path / "w" / part for part in parts
        ]


def test_a_protocol_of_whole_videos_that_does_not_score_their_layout_is_refused_at_once(tmp_path: Path) -> None:
    whole = {"data": {"source": "mevis", "root": "h"}, "protocol": "refcoco"}
    with pytest.raises(ConfigError, match=r"protocol is .refcoco., which scores data\.source refcoco"):
        job(TrainJob, tmp_path, evaluate={"whole_videos": whole})


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (3, 2), (8, 8), (15, 8), (16, 16), (64, 16)])
def test_a_training_takes_the_most_processes_that_share_its_batches(limit: int, most: int, tmp_path: Path) -> None:
    assert job(TrainJob, tmp_path).most_processes(limit) == most
    assert job(CacheJob, tmp_path).most_processes(limit) == limit


def test_every_kind_of_job_says_everything_that_is_asked_of_it() -> None:
    for name, kind in KINDS.items():
        assert name == kind.KIND and kind.COUNTS and kind.LESS_MEMORY and issubclass(kind, kind.ROOM)
        for method in ("inputs", "work", "recognised_by", "is_in", "status"):
            assert getattr(kind, method) is not getattr(Job, method)
