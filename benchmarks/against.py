"""Compares this checkout with another commit: runs the benchmarks of both in turn, and gives ratios.

    python benchmarks/against.py REV [--benchmarks train_step loader cache] [--rounds N] [--json]
    python benchmarks/against.py REV --benchmarks train_step -- --preset tiny --rounds 1 --no-mlflow

REV is checked out into a temporary git worktree, which is removed at the end. Each figure that both print with --json
gets the median over rounds of here / REV, and a bootstrap interval of 95 % (for fewer than six rounds: the lowest and
the highest). The order of the two alternates. After --: options for the benchmark of both.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("train_step", "loader", "cache")
BOOTSTRAP_FROM, DRAWS = 6, 2000


@contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """The files of a commit in a temporary worktree; uncommitted changes here stay."""
    worktree, there = ["git", "-C", str(ROOT), "worktree"], folder / "checkout"
    if subprocess.run([*worktree, "add", "--detach", "--quiet", str(there), revision]).returncode:
        sys.exit(f"REV is {revision}, which git can't check out: give a commit, branch or tag of {ROOT}")
    try:
        yield there
    finally:
        subprocess.run([*worktree, "remove", "--force", str(there)], check=True)


def figures(root: Path, benchmark: str, options: Sequence[str]) -> dict[str, float]:
    """The numbers of one run of a checkout's benchmark, with dotted names."""
    command = [sys.executable, f"benchmarks/{benchmark}.py", "--json", *options]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {root} failed:\n{done.stderr[-2000:]}")
    return dict(numbers(json.loads(done.stdout.splitlines()[-1])))


def numbers(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings; strings, booleans and lists are skipped."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield name, float(tree)


def rounds_of(
    roots: Sequence[Path], benchmark: str, options: Sequence[str], *, rounds: int
) -> list[list[dict[str, float]]]:
    """The figures of each checkout in each round; the order of the checkouts alternates."""
    found: list[list[dict[str, float]]] = [[] for _ in roots]
    for number in range(rounds):
        order = range(len(roots)) if number % 2 == 0 else reversed(range(len(roots)))
        for place in order:
            found[place].append(figures(roots[place], benchmark, options))
            print(f"{benchmark}, round {number + 1} of {rounds}: {roots[place]}", file=sys.stderr)
    return found


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of resampled rounds; for few rounds the lowest and the highest."""
    if len(ratios) < BOOTSTRAP_FROM:
        return min(ratios), max(ratios)
    drawn = np.random.default_rng(0).choice(np.array(ratios), size=(DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def compare(here: Sequence[dict[str, float]], there: Sequence[dict[str, float]]) -> dict[str, Any]:
    """For each number that every run of both has and that is never 0: the ratio of each round, summarised."""
    shared = [name for name in here[0] if all(name in run and run[name] for run in (*here, *there))]
    found = {}
    for name in shared:
        ratios = [new[name] / old[name] for new, old in zip(here, there, strict=True)]
        low, high = interval(ratios)
        found[name] = {
            "ratio": round(statistics.median(ratios), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "here": statistics.median(run[name] for run in here),
            "there": statistics.median(run[name] for run in there),
        }
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="a commit, branch or tag")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=["train_step", "loader"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout's benchmark")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--folder", type=Path, help="where the checkout goes; default: a temporary folder")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:split])
    given.options = words[split + 1 :]
    return given


def main() -> None:
    given = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed on SIGTERM too
    found = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as name, checkout(given.revision, Path(name)) as there:
        for benchmark in given.benchmarks:
            runs = rounds_of((ROOT, there), benchmark, given.options, rounds=given.rounds)
            found[benchmark] = compare(*runs)
    for benchmark, rows in found.items():
        print(f"{benchmark}: here / {given.revision}, median [interval] of {given.rounds} rounds")
        for key, row in rows.items():
            ratio = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"  {key:34} {ratio}  {row['here']:g} / {row['there']:g}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
