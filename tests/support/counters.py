"""Exact counts of a piece of work. Counts, unlike seconds, are the same on any machine under any load."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
from torch import Tensor
from torch.utils._pytree import tree_iter

from flowmask.models.cost.dry_run import _Work

EVENTS = {"import", "subprocess.Popen", "os.system", "socket.connect", "_thread.start_new_thread"}


class Operators(_Work):
    """Operators that torch runs on this thread, by name; their FLOPs; bytes sent to another device; collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0  # copied from the host to another device
        self.waited_copies = 0  # those of these copies that the host waits for
        self.collectives: list[tuple[str, int]] = []  # name, and bytes of its largest argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        if func.namespace != "profiler":  # marks for a profiler: their number depends on the optimizers made before
            self.calls[name] += 1
        if func.namespace == "c10d":
            self.collectives.append((name, max(map(tensor_bytes, args))))
        elif name in ("_to_copy", "copy_"):
            source = args[name == "copy_"]
            if source.device.type == "cpu" and result.device.type != "cpu":
                self.sent_bytes += result.nbytes
                given = kwargs or {}
                self.waited_copies += not given.get("non_blocking", len(args) > 2 and args[2])
        return result


def tensor_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


_listening: list[Counter[str]] = []


@contextmanager
def events() -> Iterator[Counter[str]]:
    """While inside, counts the system calls of all threads of the process: EVENTS by name, files as "open PATH"."""
    _hear_once()
    seen: Counter[str] = Counter()
    _listening.append(seen)
    try:
        yield seen
    finally:
        _listening.remove(seen)


@cache
def _hear_once() -> None:
    sys.addaudithook(_hear)  # a hook can't be removed


def _hear(event: str, args: Any) -> None:
    for seen in _listening:
        if event == "open":
            seen[f"open {args[0]}"] += 1
        elif event in EVENTS:
            seen[event] += 1


@contextmanager
def reads() -> Iterator[list[int]]:
    """While inside, collects the size of each `os.preadv`."""
    sizes: list[int] = []
    real = os.preadv

    def counted(*args: Any) -> int:
        sizes.append(real(*args))
        return sizes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        yield sizes
