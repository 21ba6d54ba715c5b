"""Runs checks in another process, so that one that crashes, hangs or holds a GPU only produces a finding."""

import json
import subprocess
import sys
from typing import Any


def ask(code: str) -> tuple[Any, str]:
    """The last line that Python code prints, as JSON, and the last line of its error output."""
    printed, problem = run([sys.executable, "-c", code])
    return (None, problem) if problem else (json.loads(printed.splitlines()[-1]), "")


def run(command: list[str], *, timeout_s: float = 120) -> tuple[str, str]:
    """Output and, if the command failed, the last line of its error output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {timeout_s:.0f} s"
    if done.returncode == 0:
        return done.stdout.strip(), ""
    said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
    return "", said[-1] if said else f"ended with code {done.returncode}"
