"""Benchmark protocols: each is one file, here or in an installed package, and needs no other change.

Its name, `protocol` of an evaluation, is that of its file, or of an entry point of the group `flowmask.protocols`; the
contract is `base.BenchmarkProtocol`. The numbers are those of the benchmark's own public code, made by pure functions.
If several conventions are in use under one name, each has its own table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flowmask.models.plugins.registry import Registry
from flowmask.trainer.score.protocols.base import BenchmarkProtocol

_KNOWN = Registry(__name__, BenchmarkProtocol, group="flowmask.protocols", key="protocol")  # type: ignore[type-abstract]
_TITLES = {
    "j": "J",
    "f": "F",
    "jf": "J&F",
    "a": "A",
    "r": "R",
    "t_iou": "tIoU",
    "v_iou": "vIoU",
    "map": "mAP",
    "o_iou": "oIoU",
    "m_iou": "mIoU",
    "g_iou": "gIoU",
    "c_iou": "cIoU",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    "final": "Final",
}


def protocol_named(name: str) -> BenchmarkProtocol:
    """The protocol of a name; raises ConfigError with the list of known ones."""
    return _KNOWN.get(name)()


def in_scores(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The value of `protocol` in scores.json, from the protocol's part of each video's record, in order.

    name, convention (the default's) and tables: convention -> group -> number by name, in percent, None if the group
    has no scores
    """
    protocol = protocol_named(name)
    return {"name": name, "convention": protocol.conventions[0], "tables": protocol.overall(records)}


def numbers_by_name(known: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The numbers of the default convention, each named `<protocol>_<part>_<number>`; empty for no protocol.

    known: as returned by `in_scores`
    """
    if known is None:
        return {}
    found: dict[str, float | None] = {}
    for title, row in known["tables"][known["convention"]].items():
        part = "" if title == "all" else f"{title.replace(' ', '_')}_"
        found |= {f"{known['name']}_{part}{name}": value for name, value in row.items()}
    return found


def number_title(name: str) -> str:
    """A number's usual name in text."""
    return _TITLES.get(name) or name.replace("precision_", "P@").replace("ap_", "AP ").replace("_", " ")
