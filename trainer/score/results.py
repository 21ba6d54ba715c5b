"""From the records of single videos to the scores of a dataset, and the report about them.

Means are taken over (video, expression id), each counted once, even if its sentence occurs often.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowmask.data_pipeline.sources.base import Video, names_nothing
from flowmask.trainer.predict.presence import Presence
from flowmask.trainer.score.archive import write_archive
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.intervals import Drawable, Interval, intervals
from flowmask.trainer.score.mask_places import MaskNames
from flowmask.trainer.score.metrics import MAIN, metrics, shown_in, totals
from flowmask.trainer.score.metrics.base import PerSet
from flowmask.trainer.score.protocols import in_scores, mevis
from flowmask.trainer.score.protocols.answers import Agreement
from flowmask.trainer.score.report.examples import choose, example
from flowmask.trainer.score.report.overlays import write_overlays
from flowmask.trainer.score.report.page import ReportRow, with_interval, write_report
from flowmask.trainer.score.slices import Slices, slices
from flowmask.trainer.score.store import REPORT
from flowmask.trainer.state.provenance import git_commit

NO_MASKS = "The dataset has no masks: masks/ holds the predictions, but no score is possible."
NOTHING = {
    "n_acc": "N-acc (share of sentences without a target that have an empty mask)",
    "t_acc": "T-acc (share of sentences with a target that have a mask)",
    "final": "Final (mean of J&F, N-acc and T-acc)",
    "jf_target": "J&F of sentences with a target",
    "final_target": "Final with that J&F",
}


@dataclass(frozen=True)
class Scores:
    """The content of scores.json.

    totals:         every metric over all expressions, None if the dataset has no masks; each is a key in scores.json
    per_expression: `<video>/<expression>`, the name of their folder below masks/ -> every metric
    ids:            video id and expression id of those with another folder name
    no_target:      expressions that name nothing; all means include them: an empty mask scores 100, any other 0
    nothing:        n_acc, t_acc, final, jf_target and final_target (protocols/mevis.py), in percent, keys of
                    scores.json; None without such expressions or without masks
    shuffled_text:  jf_right with the right, jf_shuffled with the wrong sentences, of the same expressions
    protocol:       the result of `in_scores` of protocols/__init__.py; None if no protocol was requested
    decoder:        every metric of the true masks after the VAE and the mask decoder: the method's upper bound
    intervals:      [low, high] of each of `totals` and `nothing` (intervals.py), None if that is None, or without masks
    presence:       the threshold in use and its settings (predict/presence.py); None: no mask was emptied. Its
                    value is also in `presence_threshold`
    presences:      `<video>/<expression>` -> the presence of each expression, for any threshold
    left_empty:     `<video>/<expression>` -> whether the mask is empty, for expressions that name nothing; N-acc is
    their mean
    slices:         slice -> bucket -> every metric and the number of expressions (slices.py); None without masks
    """

    totals: dict[str, float | None]
    per_expression: dict[str, dict[str, float]]
    videos: int
    expressions: int
    no_target: int
    nothing: dict[str, float | None]
    frames: int
    shuffled_text: dict[str, Any] | None
    decoder: dict[str, float] | None
    protocol: dict[str, Any] | None
    checkpoint: str
    weights: dict[str, str]
    note: str
    intervals: dict[str, Interval | None] | None
    slices: Slices | None
    presence: dict[str, Any] | None = None
    presences: dict[str, float] = field(default_factory=dict)
    left_empty: dict[str, bool] = field(default_factory=dict)
    fingerprint: str = ""  # of everything that affects them: settings, dataset, weights
    ids: dict[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The scores in the form of scores.json."""
        left_out = {"totals", "nothing"} | (set() if self.ids else {"ids"})
        rest = {key: value for key, value in asdict(self).items() if key not in left_out}
        threshold = self.presence["threshold"] if self.presence else None
        return {**self.totals, **self.nothing, "presence_threshold": threshold, **rest}


def merge(
    videos: Sequence[Video],
    records: Sequence[Mapping[str, Any]],
    *,
    protocol: str | None = None,
    presence: Presence | None = None,
    checkpoint: str,
    weights: Mapping[str, str],
    fingerprint: str,
    seed: int,
) -> Scores:
    """Scores of a dataset from each video's record, in the order of the videos.

    protocol: the name of a benchmark's; presence: the threshold that was used; seed: draws the intervals
    """
    names = MaskNames(videos)
    named = [(video, names.keys(video)) for video in videos]
    entries = {
        keys[exp_id]: entry
        for (_, keys), record in zip(named, records)
        for exp_id, entry in record["expressions"].items()
    }
    ids = {key: (video.video_id, exp_id) for video, keys in named for exp_id, key in keys.items()}
    right = {key: entry["right"] for key, entry in entries.items() if "right" in entry}
    total = _totals(entries.values(), "right")
    both = [entry for entry in entries.values() if "wrong" in entry]
    shuffled = None
    if both:
        shuffled = {
            "expressions": len(both),
            "jf_right": _totals(both, "right")[MAIN],
            "jf_shuffled": _totals(both, "wrong")[MAIN],
        }
    nothing = {
        keys[expression.exp_id]
        for video, keys in named
        for expression in video.expressions
        if names_nothing(video, expression)
    }
    totals_known = {name: total.get(name) for name in ("j", "f", *metrics())}
    saying_nothing = _saying_nothing(entries, nothing)
    return Scores(
        totals=totals_known,
        per_expression=right,
        videos=len(videos),
        expressions=len(entries),
        no_target=len(nothing),
        nothing=saying_nothing,
        frames=sum(record["frames"] for record in records),
        shuffled_text=shuffled,
        decoder=_totals(entries.values(), "decoder") or None,
        protocol=None if protocol is None else in_scores(protocol, [record["protocol"] for record in records]),
        checkpoint=checkpoint,
        weights=dict(weights),
        note="" if right else NO_MASKS,
        intervals=_intervals(entries, nothing, totals_known | saying_nothing, seed=seed) if right else None,
        slices=slices(videos, records),
        presence=None if presence is None else presence.model_dump(mode="json"),
        presences={key: entry["presence"] for key, entry in entries.items() if "presence" in entry},
        left_empty={key: not entries[key]["answered"] for key in right if key in nothing},
        fingerprint=fingerprint,
        ids={key: pair for key, pair in ids.items() if key != "/".join(pair)},
    )


def _saying_nothing(entries: Mapping[str, Mapping[str, Any]], nothing: Collection[str]) -> dict[str, float | None]:
    """How often "nothing" was correct, for the expressions with scores; `nothing` names those without a target."""
    answers = [
        Agreement(entry["right"]["j"] / 100, entry["right"]["f"] / 100, key not in nothing, entry["answered"])
        for key, entry in entries.items()
        if "right" in entry
    ]
    found = mevis.overall(answers)
    return {name: found[name] if nothing else None for name in NOTHING}


def _intervals(
    entries: Mapping[str, Mapping[str, Any]], nothing: Collection[str], known: Mapping[str, float | None], *, seed: int
) -> dict[str, Interval | None]:
    """The interval of each of the `known` numbers; None for those that are None."""
    rows = []
    for key, entry in entries.items():
        if "right" in entry:
            answer = 100.0 * entry["answered"]
            more = {"n_acc": 100 - answer} if key in nothing else {"t_acc": answer, "jf_target": entry["right"][MAIN]}
            sums = entry.get("sums", {}).get("right", {})
            rows.append(Drawable(key.split("/")[0], {**entry["right"], **more}, sums))
    found = intervals(
        rows,
        seed=seed,
        of_sums={name: metric.value for name, metric in metrics().items() if isinstance(metric, PerSet)},
        means_of={"final": (MAIN, "n_acc", "t_acc"), "final_target": ("jf_target", "n_acc", "t_acc")},
    )
    return {name: None if value is None else found.get(name) for name, value in known.items()}


def _totals(entries: Iterable[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """Every metric of the entries that have scores of a kind; empty for none."""
    some = [entry for entry in entries if kind in entry]
    return totals([entry[kind] for entry in some], [entry.get("sums", {}).get(kind, {}) for entry in some])


def finish(
    config: EvaluateConfig,
    videos: Sequence[Video],
    masks: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    out: Path,
    weights: Mapping[str, str],
    presence: Presence | None,
    fingerprint: str,
    step: int | None,
) -> Scores:
    """Merge all records, write the report, its overlay videos and the archive; return the content of scores.json.

    masks: the folder of all masks; out: the empty folder for the results; step: of the checkpoint, if it has one.
    """
    scores = merge(
        videos,
        records,
        protocol=config.protocol,
        presence=presence,
        checkpoint=config.checkpoint,
        weights=weights,
        fingerprint=fingerprint,
        seed=config.seed,
    )
    names = MaskNames(videos)
    pairs = {names.keys(video)[e.exp_id]: (video, e) for video in videos for e in video.expressions}
    rows = [ReportRow(key, pairs[key][1].text, entry) for key, entry in scores.per_expression.items()]
    ranks = {key: entry[MAIN] for key, entry in scores.per_expression.items()}
    chosen = choose(pairs, ranks, config.report_examples, seed=config.seed)
    write_report(
        out / REPORT,
        title="FlowMask evaluation",
        facts=_facts(config, scores),
        made_from=_made_from(config, step, presence),
        metrics=shown_in("report"),
        rows=rows,
        slices=scores.slices or {},
        examples={
            how: [example(key, *pairs[key], masks=masks, scores=scores.per_expression) for key in keys]
            for how, keys in chosen.items()
        },
        note=scores.note,
        protocol=scores.protocol,
    )
    drawn = {key: pairs[key] for keys in chosen.values() for key in keys}
    write_overlays(out, drawn, masks=masks)
    if config.archive is not None:
        write_archive(out, masks=masks, layout=config.archive)
    return scores


def _facts(config: EvaluateConfig, scores: Scores) -> dict[str, str]:
    main, shown = metrics()[MAIN], shown_in("report")
    titles = {name: (metric.title, metric) for name, metric in shown.items()}
    titles |= {name: (title, main) for name, title in NOTHING.items()}
    known = {name: value for name, value in (scores.totals | scores.nothing).items() if value is not None}
    sure = scores.intervals or {}
    named = {
        title: with_interval(metric, known[name], sure.get(name))
        for name, (title, metric) in titles.items()
        if name in known
    }
    if scores.shuffled_text:
        named[f"{main.title} with the wrong sentences"] = main.say(scores.shuffled_text["jf_shuffled"])
    if scores.decoder:
        named[f"{main.title} of the mask decoder alone"] = main.say(scores.decoder[MAIN])
    return named | {
        "videos": str(scores.videos),
        "expressions": str(scores.expressions),
        **({"of them naming nothing": str(scores.no_target)} if scores.no_target else {}),
    }


def _made_from(config: EvaluateConfig, step: int | None, presence: Presence | None) -> dict[str, str]:
    """Data, weights, sampling, code and time of the evaluation."""
    some = f", its first {config.max_videos} videos" if config.max_videos is not None else ""
    return {
        "Dataset": f"{config.data.source}, {config.data.root}",
        "Split": config.data.split + some,
        "Checkpoint": config.checkpoint,
        **({"Step": f"{step:,}"} if step is not None else {}),
        "Weights": "averaged (EMA)" if config.ema else "last step",
        "Euler steps": str(config.sampler.steps),
        **({"Presence threshold": presence.said()} if presence is not None else {}),
        "Commit of the code": git_commit(),
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
