"""The version of the running code: the commit of its checkout, or the one from which its snapshot was taken.

SNAPSHOT/code/               the packages of a submitted job
SNAPSHOT/provenance.json     the commit, written at the submission
"""

import json
import subprocess
from pathlib import Path

import flowmask

PACKAGE = Path(flowmask.__file__).resolve().parent  # contains all code; in a checkout it links to the folders
ROOT = PACKAGE.parent
PROVENANCE = "provenance.json"
UNKNOWN = "unknown"


def git_commit() -> str:
    """The commit of the running code, `-dirty` if files differ from it; "unknown" if undetermined."""
    if not (ROOT / ".git").exists():
        return _of_snapshot()
    said = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return (said or "").strip() or UNKNOWN


def git(*words: str) -> str | None:
    """Output of git for the checkout; None without git or a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _of_snapshot() -> str:
    try:
        facts = json.loads((ROOT.parent / PROVENANCE).read_text())
        return f"{facts['commit'] or UNKNOWN}{'-dirty' if facts['changed'] else ''}"
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN
