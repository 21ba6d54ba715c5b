"""How several processes share the tests (`make test`): a file is never split.

Files that need the same slow fixture run in one process, so that it is made once, and they run first.
"""

import gc
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from browser import why_no_browser
from cluster import why_not
from forks import draw_small_overlays
from trials import drawn_tests

# Words in test files that begin first, in this order: those that take longest, then those that share a slow fixture.
COSTLY = ("from real_size", "import toy as", "import DITS", "import Cluster", "smoke:", "two_ranks:", "Line, Postgres")
ROOT = Path(__file__).parents[1]
# Several processes share the cores, and OpenMP's threads spin while they wait for each other: a training of ten steps
# took 20 s in place of 2. torch and numpy, which read this, are not imported yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@lru_cache
def costly(file: str) -> str | None:
    """A word in a test file that begins early, since it, or a fixture that such files share, takes long."""
    text = (ROOT / file).read_text()
    return next((word for word in COSTLY if word in text), None)


@pytest.fixture(scope="session", autouse=True)
def nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own key (models/safe/signature.py) is made in a temporary folder."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session", autouse=True)
def small_overlays() -> None:
    draw_small_overlays()


@pytest.fixture(autouse=True)
def no_test_changes_the_priority_of_those_after_it() -> Iterator[None]:
    """A process with real-time priority would take all CPU time from the others."""
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
    yield
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == before


def compute_in_one_thread() -> None:
    """OpenMP's threads do not survive a fork: after a parent that used them, a child would wait for them for ever."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


# No deadline: the time of an example says nothing on a busy machine.
hypothesis.settings.register_profile("laws", deadline=None)
hypothesis.settings.load_profile("laws")
os.register_at_fork(after_in_child=compute_in_one_thread)


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and item.originalname in drawn_tests(item.path):
        item.add_marker("drawn")


def pytest_collection_finish() -> None:
    """All that is imported by now stays: each later collection of garbage need not look through it, for 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: COSTLY.index(word) if (word := costly(item.location[0])) else len(COSTLY))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return costly(file) or file

    return Together(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reason = why_not()
    if reason is not None:
        terminalreporter.write_line(f"tests/slurm: skipped, no SLURM here: {reason}")
    reason = why_no_browser()
    if reason is not None:
        terminalreporter.write_line(f"tests/launch/serve: the page itself is skipped, {reason}")
