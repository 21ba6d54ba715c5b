"""Parts of a benchmark that are run by name, tables that are printed as they are measured, and fresh processes."""

import json
import resource
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_PARTS: dict[str, Callable[[Namespace], None]] = {}


def part(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a part of this benchmark."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _PARTS[name] = function
        return function

    return add


def table(head: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    """Print a table line by line, as its rows are measured."""
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n", flush=True)
    for row in rows:
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) + " |", flush=True)


def fresh(function: str, *arguments: object) -> dict[str, Any]:
    """The result of a function of this file in a separate process, with its CPU seconds and peak memory."""
    command = [sys.executable, sys.argv[0], "--call", function, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(work: Callable[[], object]) -> dict[str, Any]:
    began = time.process_time()
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu_s": time.process_time() - began, "peak_mib": peak}


def run(doc: str, functions: dict[str, Any], add_options: Callable[[ArgumentParser], None]) -> None:
    """Run the part that the command line names, or as a fresh process the function that `fresh` asked for."""
    if sys.argv[1:2] == ["--call"]:
        print(json.dumps(functions[sys.argv[2]](*sys.argv[3:])))
        return
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=_PARTS)
    add_options(parser)
    arguments = parser.parse_args()
    _PARTS[arguments.part](arguments)
