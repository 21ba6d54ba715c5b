"""Freezes what a submitted job needs into its own folder, so that editing the checkout does not change a queued job.

    code/              the packages, first on the job's PYTHONPATH
    provenance.json    git commit, versions of the packages, Python, host; environment.json without secrets
    changes.patch      what the checkout had changed since that commit

Nothing secret is written: variables whose name or value looks like a credential are left out, and counted.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
from pathlib import Path

from flowmask.models.files import write_atomically
from flowmask.trainer.state.provenance import PACKAGE, PROVENANCE, git

CODE = "code"
SOURCES = ("flowmask", "models", "data_pipeline", "trainer", "launch", "configs")  # in a checkout
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|PWD$|KEY|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE|DSN", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s]*@|-----BEGIN|\b(?:gh[pousr]_|sk-|hf_|AKIA|eyJ)[\w-]{10,}")


def freeze(folder: Path) -> Path:
    """Write the snapshot of this code into `folder`; returns the folder to import it from."""
    code = folder / CODE
    shutil.copytree(PACKAGE, code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    commit, patch = _git_state()
    facts = {
        "commit": commit,
        "changed": bool(patch),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": _versions(),
    }
    write_atomically(folder / PROVENANCE, json.dumps(facts, indent=1))
    write_atomically(folder / "environment.json", json.dumps(_environment(dict(os.environ)), indent=1))
    write_atomically(folder / "changes.patch", patch)
    return code


def _environment(variables: dict[str, str]) -> dict[str, str]:
    """Variables without those that may be secret: their values must not lie in a folder that others read."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)
    }


def _versions() -> dict[str, str]:
    """Version of every installed distribution."""
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(filter(None, found))}


def _git_state() -> tuple[str | None, str]:
    """Commit and changes of the packages in the checkout; (None, "") where they are not in one."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, ""
    patch = git("diff", "--binary", "HEAD", "--", *SOURCES) or ""
    added = (git("ls-files", "--others", "--exclude-standard", "--", *SOURCES) or "").splitlines()
    return commit.strip(), patch + "".join(f"# not in the commit, copied whole into code/: {name}\n" for name in added)
