"""A person's browser for tests: headless Chromium, a fresh profile each time, and the packages that the page needs.

Gradio 6 wants an older Pillow than `constraints.txt` has, so tests/launch/serve/install.sh puts both, and the driver of
the browser, into a folder beside all others, which is on the path of the page's process alone.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / ".venv-serve"
NEEDED = os.environ.get("FLOWMASK_NEED_BROWSER") == "1"  # skipping would be a lie
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def why_no_browser() -> str | None:
    """What is missing here; None if the page can be opened."""
    missing = [name for name in ("gradio", "playwright") if not _is_there(name)]
    if chromium() is None:
        missing.append("chromium")
    return f"no {' and no '.join(missing)} here: tests/launch/serve/install.sh" if missing else None


def chromium() -> str | None:
    """The program."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def page_environment(*more: Path) -> dict[str, str]:
    """Of the page's process; `more`: folders that come first on its path."""
    path = os.pathsep.join(map(str, (*more, ROOT, PACKAGES)))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def browser() -> Iterator[Any]:
    """A Chromium; each of its contexts is another person."""
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(_FLAGS))
        yield started
        started.close()


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None or (PACKAGES / package).is_dir()
