"""MeViS, v1 and v2 `valid_u`: J, F and J&F over all expressions, and the accuracy of empty answers.

J&F follows henghuiding/MeViS tools/eval_mevis.py (7c0620b), which has no sentences without a target: its
empty answer scores 1 in every frame. For v2 no public scorer was found. N-acc, T-acc and Final follow published rows
and the abstract of the LSVOS 2026 winner (arXiv 2608.11458). It is unknown whether v2's J&F covers all expressions or
only those with a target; so both are given: `final` with all, `final_target` with those that have one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from flowmask.data_pipeline.sources.base import Video, names_nothing
from flowmask.trainer.score.protocols.answers import Agreement, mean
from flowmask.trainer.score.protocols.base import Answer, PerAnswer, Table


class Mevis(PerAnswer):
    """One table with J&F and Final over all expressions, one with both over those that have a target."""

    conventions = ("all_expressions", "target_expressions")
    sources = ("mevis", "synthetic", "videos")

    def of_answer(self, video: Video, answer: Answer) -> dict[str, Any]:
        has_target = not names_nothing(video, answer.expression)
        return asdict(Agreement(float(np.mean(answer.j)), float(np.mean(answer.f)), has_target, answer.answered))

    def tables(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
        found = overall([Agreement(**entry) for entry in entries])
        accuracies = {name: found[name] for name in ("n_acc", "t_acc")}
        rows = {
            convention: {name: found[f"{name}{ending}"] for name in ("jf", "j", "f")}
            | accuracies
            | {"final": found[f"final{ending}"]}
            for convention, ending in zip(self.conventions, ("", "_target"))
        }
        return {convention: {"all": row} for convention, row in rows.items()}


def overall(items: Sequence[Agreement]) -> dict[str, float | None]:
    """In percent: j, f, jf, jf_target, n_acc, t_acc, final, final_target; None if there is no such sentence.

    n_acc: share of no-target expressions with empty masks in all frames; t_acc: share of the others with a mask in some
    frame
    """
    target = [item for item in items if item.has_target]
    nothing = [item for item in items if not item.has_target]
    shares = {
        "j": mean(item.j for item in items),
        "f": mean(item.f for item in items),
        "jf": mean((item.j + item.f) / 2 for item in items),
        "j_target": mean(item.j for item in target),
        "f_target": mean(item.f for item in target),
        "jf_target": mean((item.j + item.f) / 2 for item in target),
        "n_acc": mean(not item.answered for item in nothing),
        "t_acc": mean(item.answered for item in target) if nothing else None,
    }
    percent = {name: None if share is None else 100 * share for name, share in shares.items()}
    return percent | {
        "final": _final(percent["jf"], percent["n_acc"], percent["t_acc"]),
        "final_target": _final(percent["jf_target"], percent["n_acc"], percent["t_acc"]),
    }


def _final(*parts: float | None) -> float | None:
    """The mean of J&F, N-acc and T-acc; None if one of them is undefined."""
    known = [part for part in parts if part is not None]
    return sum(known) / 3 if len(known) == 3 else None
