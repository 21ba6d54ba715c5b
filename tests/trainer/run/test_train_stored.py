"""Laws of training from an object store: the run equals that on the folder, also after a stop; no secret is stored."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import BUCKET, ENVIRONMENT, moto_process, own_connection, upload
from pydantic import ValidationError
from runs import SignalAt, losses, rows, run_config, run_group, start, unequal_tensors

from flowmask.models.process import REQUEUE_EXIT_CODE

EVALUATED = {"train.steps": 8, "evaluate.every_steps": 4, "evaluate.examples": 4, "evaluate.jf_examples": 0}


@pytest.fixture(scope="module")
def port(lab: Path) -> Iterator[int]:
    """Port of a server that holds the lab's cache."""
    with moto_process() as port:
        upload(port, lab / "cache", "lab")
        yield port


@pytest.fixture
def url(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The lab's cache in an object store; environment variables lead this process there."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    with own_connection():
        yield f"s3://{BUCKET}/lab"


def test_a_run_on_a_store_stopped_and_resumed_is_the_run_on_the_folder_that_never_stopped(
    lab: Path, url: str, tmp_path: Path
) -> None:
    assert start(lab, tmp_path / "whole", EVALUATED | {"evaluate.cache": str(lab / "cache")}) == 0
    stored = EVALUATED | {"data.cache": url, "evaluate.cache": url}
    out = tmp_path / "stopped"
    with SignalAt.on_every_run():
        assert start(lab, out, stored | {"data.local_cache": str(tmp_path / "disk")}) == REQUEUE_EXIT_CODE
    assert len(losses(out)) == SignalAt.step + 1
    assert start(lab, out, stored | {"data.local_cache": str(tmp_path / "another"), "data.local_cache_gib": 1}) == 0
    assert losses(out) == losses(tmp_path / "whole") and not unequal_tensors(out, tmp_path / "whole")
    batches = [[row["batch"] for row in rows(path)] for path in (out, tmp_path / "whole")]
    assert batches[0] == batches[1] and len(set(batches[0])) == 8
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(ENVIRONMENT[name].encode() in content for content in kept for name in list(ENVIRONMENT)[:2])


@pytest.mark.long
def test_ranks_of_a_node_share_what_is_on_its_disk(lab: Path, url: str, tmp_path: Path) -> None:
    shared = {"data.cache": url, "data.local_cache": str(tmp_path / "disk"), "train.steps": 8}
    jobs = [
        {"lab": str(lab), "out": str(tmp_path / name), "overrides": overrides}
        for name, overrides in (("stored", shared), ("folder", {"train.steps": 8}))
    ]
    run_group(jobs, folder=tmp_path / "logs")
    assert losses(tmp_path / "stored") == losses(tmp_path / "folder")


def test_a_held_out_cache_at_a_url_needs_the_disk_too(lab: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"evaluate\.cache is s3://bucket/x, which needs data\.local_cache"):
        run_config(lab, tmp_path, {"evaluate.cache": "s3://bucket/x"})
