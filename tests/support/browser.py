"""A browser for tests: headless Chromium with a fresh profile each time."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = os.environ.get("FLOWMASK_NEED_BROWSER") == "1"  # `make test-page`: a missing browser must not skip the tests
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def why_no_browser() -> str | None:
    """The reason why the page can't be opened here; None if it can."""
    return None if chromium() is not None else "no chromium here: tests/launch/serve/install.sh"


def chromium() -> str | None:
    """The path of the program."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def page_environment(*more: Path) -> dict[str, str]:
    """Environment of the page's process; `more`: folders that come first on its path."""
    path = os.pathsep.join(map(str, (*more, ROOT)))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium; each of its contexts is another user."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(_FLAGS))
        yield started
        started.close()
