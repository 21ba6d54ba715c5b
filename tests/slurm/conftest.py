"""One cluster for all tests of this folder. Without its packages the tests are skipped, and the summary says so."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, running_cluster, why_not
from runs import cache_settings, make_lab

NEEDED = os.environ.get("FLOWMASK_NEED_SLURM") == "1"  # `make test-slurm`: a missing SLURM must not skip the tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="package")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        (pytest.fail if NEEDED else pytest.skip)(reason)
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two idle nodes for the commands of a test. The jobs of a test are cancelled at its end."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, one_cluster.environment[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield one_cluster
    one_cluster.cancel_all()


@pytest.fixture(scope="package")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan, a finished cache, and `cache.yaml`, whose build takes some seconds."""
    folder = tmp_path_factory.mktemp("lab")
    make_lab(folder)
    settings = cache_settings(folder)
    settings["cache"] = {"clips_per_shard": 1, "views": 24, "device": "cpu"}
    (folder / "cache.yaml").write_text(yaml.safe_dump(_plain(settings)))
    return folder


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
