"""A whole evaluation of a tiny MeViS-layout dataset: pixels, logits, masks, truth, scores and averages."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.data_pipeline.clip.pixels import eval_size, pad_to_stride, resize_frame, to_signed
from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.sources import open_source
from flowmask.models.config import SamplerConfig
from flowmask.models.segment import Segmenter, SegmentSettings, masks_at, resize_logits
from flowmask.models.vae import latent_frames
from parity.core import Check, ParitySet, names_are, near, same, unpack
from parity.decoder_case import recorded_vae
from parity.dit_case import recorded_dit
from parity.metrics_case import clip_scores
from parity.text_case import recorded_text_encoder

SPLIT = "valid_u"
SCORE, LOGIT, NEAR = 2e-3, 2e-4, 1e-3
Query = tuple[str, str]  # video, expression id


class Evaluation:
    """Our own evaluation of the recorded dataset; each part is computed when a check needs it."""

    def __init__(self, data: ParitySet) -> None:
        self.data = data
        self.expected = data.record("e2e/expected.json")
        self.tensors = data.tensors("e2e/expected.safetensors")
        source = open_source(DataSourceConfig(source="mevis", root=data.root / "e2e" / "data", split=SPLIT))
        self.videos = {video.video_id: video for video in source.videos()}
        self.texts = {(v.video_id, e.exp_id): e.text for v in source.videos() for e in v.expressions}
        self.pixels = functools.cache(self.pixels)
        self.segmenter = functools.cache(self.segmenter)
        self.latent = functools.cache(self.latent)
        self.logits = functools.cache(self.logits)
        self.truth = functools.cache(self.truth)
        self.scores = functools.cache(self.scores)

    def size(self, video: str) -> tuple[int, int]:
        """(width, height) of a video's frames."""
        height, width = self.videos[video].size
        return width, height

    @functools.cached_property
    def box(self) -> tuple[int, int]:
        """(width, height) of the evaluation box. No file holds it; any box that gives all sizes is right."""
        wanted = {v: tuple(self.tensors[f"{v}.vae_input"].shape[-2:]) for v in self.videos}
        for width, height in itertools.product(range(16, 865, 16), repeat=2):
            try:
                sizes = {v: eval_size(*self.size(v), width=width, height=height, multiple=16)[::-1] for v in wanted}
            except Exception:  # noqa: BLE001 - a box that refuses a video is not the one
                continue
            if sizes == wanted:
                return width, height
        raise AssertionError(f"no evaluation box gives the sizes {wanted}")

    def pixels(self, video: str) -> Tensor:
        width, height = self.box
        size = eval_size(*self.size(video), width=width, height=height, multiple=16)
        read = self.videos[video].frames(range(len(self.videos[video].frame_names)))
        signed = to_signed([resize_frame(frame, size=size) for frame in read])
        return pad_to_stride(signed, dim=1)[None]

    def segmenter(self, steps: int) -> Segmenter:
        vae, decoder = recorded_vae(self.data)
        return Segmenter(
            recorded_dit(self.data, "dit_dvi"),
            vae=vae,
            text_encoder=recorded_text_encoder(self.data),
            mask_decoder=decoder,
            settings=SegmentSettings(
                sampler=SamplerConfig(steps=steps),
                text_tokens=self.data.tensors("text/io.safetensors")["input_ids"].shape[1],
                lowercase=False,
            ),
        )

    def latent(self, video: str) -> Tensor:
        return self.segmenter(1).encode_video(latent_frames(self.pixels(video)))

    def logits(self, steps: int, query: Query) -> Tensor:
        return self.segmenter(steps).logits(self.latent(query[0]), self.texts[query])

    def frames(self, query: Query) -> int:
        return len(self.videos[query[0]].frame_names)

    def resized(self, steps: int, query: Query) -> NDArray[np.float32]:
        kept = self.logits(steps, query)[: self.frames(query)]
        return resize_logits(kept, size=self.size(query[0])).numpy()

    def resized_record(self, logits: Tensor, query: Query) -> NDArray[np.float32]:
        """Recorded logits [1 1 F H W] at the video's own size, without padding frames."""
        return resize_logits(logits[0, 0, : self.frames(query)], size=self.size(query[0])).numpy()

    def mask(self, steps: int, query: Query) -> NDArray[np.bool_]:
        logits = self.logits(steps, query)
        return masks_at(logits, frames=self.frames(query), size=self.size(query[0])).numpy()

    def truth(self, query: Query) -> NDArray[np.bool_]:
        video = self.videos[query[0]]
        (expression,) = [e for e in video.expressions if e.exp_id == query[1]]
        return video.mask(expression.anno_ids, range(len(video.frame_names)))

    def scores(self, steps: int, query: Query) -> dict[str, list[float]]:
        return dict(zip("JF", clip_scores(self.truth(query), self.mask(steps, query))))

    def means(self, steps: int) -> dict[Query, dict[str, float]]:
        return {q: {k: float(np.mean(v)) for k, v in self.scores(steps, q).items()} for q in self.texts}


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    j, f = (float(np.mean([row[key] for row in rows])) for key in "JF")
    return {"total": len(rows), "J": j, "F": f, "JF": (j + f) / 2}


def _mask_checks(run: Evaluation, steps: int, query: Query) -> Iterator[Check]:
    key = f"steps{steps}.{query[0]}.{query[1]}"
    recorded = run.tensors

    def mask() -> None:
        want = unpack(recorded[f"{key}.mask"], run.size(query[0])[0])
        same(np.where(np.abs(run.resized(steps, query)) > NEAR, run.mask(steps, query), want), want)

    def logits() -> None:
        near(run.logits(steps, query).clamp(-1, 1)[None, None], recorded[f"{key}.logits"], abs=LOGIT)

    def mask_of_record() -> None:
        """Uses none of our code: the recorded mask equals recorded logits > 0, at the original size."""
        resized = run.resized_record(recorded[f"{key}.logits"], query)
        want = unpack(recorded[f"{key}.mask"], run.size(query[0])[0])
        same(np.where(np.abs(resized) > 1e-5, resized > 0, want), want)

    yield Check(f"{key}.mask", mask)
    if f"{key}.logits" in recorded:
        yield Check(f"{key}.logits", logits)
        yield Check(f"{key}.mask of the recorded logits", mask_of_record)


def _score_checks(run: Evaluation, steps: int, entry: Mapping[str, Any]) -> Iterator[Check]:
    for query, text in run.texts.items():
        record = entry["per_expression"]["/".join(query)]
        name = f"steps_{steps}.{'/'.join(query)}"
        yield Check(f"{name}.exp", lambda r=record, t=text: same(t, r["exp"]))
        for key in "JF":
            yield Check(f"{name}.{key}", lambda q=query, k=key, r=record: near(run.means(steps)[q][k], r[k], abs=SCORE))
            yield Check(
                f"{name}.{key}_frames count",
                lambda q=query, k=key, r=record: same(len(r[f"{k}_frames"]), run.frames(q)),
            )
            for i in range(run.frames(query)):
                yield Check(
                    f"{name}.{key}_frames[{i}]",
                    lambda q=query, k=key, r=record, i=i: near(
                        run.scores(steps, q)[k][i], r[f"{k}_frames"][i], abs=SCORE
                    ),
                )

    def by_text() -> dict[str, float]:
        """The reference's average: keyed by the sentence, so a later query overwrites an equal earlier one."""
        return average(list({text: run.means(steps)[query] for query, text in run.texts.items()}.values()))

    def by_query() -> dict[str, float]:
        return average(list(run.means(steps).values()))

    for kind, ours in (("reference_average", by_text), ("per_expression_average", by_query)):
        for key in ("total", "J", "F", "JF"):
            tolerance = 1e-9 if key == "total" else SCORE
            yield Check(
                f"steps_{steps}.{kind}.{key}",
                lambda o=ours, k=key, d=kind, t=tolerance: near(o()[k], entry[d][k], abs=t),
            )
    yield Check(f"steps_{steps}.fraction_of_pixels_near_threshold", lambda: _near_threshold(run, steps, entry))


def _near_threshold(run: Evaluation, steps: int, entry: Mapping[str, Any]) -> None:
    """The largest share, over the queries, of pixels within NEAR of zero.

    The recorded share lies between the shares of a narrower and a wider band. The bands differ from NEAR by the
    tolerance of the logits: small where the record has logits, LOGIT where ours are used.
    """
    low, high = [], []
    for query in run.texts:
        stored = run.tensors.get(f"steps{steps}.{query[0]}.{query[1]}.logits")
        slack = LOGIT if stored is None else 1e-6
        values = np.abs(run.resized(steps, query) if stored is None else run.resized_record(stored, query))
        low.append((values < NEAR - slack).mean())
        high.append((values < NEAR + slack).mean())
    share = entry["fraction_of_pixels_near_threshold"]
    assert max(low) - 1e-7 <= share <= max(high) + 1e-7, f"{share} outside {max(low)} .. {max(high)}"


def e2e_checks(data: ParitySet) -> Iterator[Check]:
    run = Evaluation(data)
    schedules = [int(re.fullmatch(r"steps_(\d+)", key)[1]) for key in run.expected]
    queries = list(run.texts)
    known = [f"{video}.vae_input" for video in run.videos]
    known += [f"{video}.{exp}.gt" for video, exp in queries]
    keys = [f"steps{n}.{video}.{exp}" for n in schedules for video, exp in queries]
    known += [f"{key}.mask" for key in keys]
    logits = [f"{key}.logits" for key in keys if f"{key}.logits" in run.tensors]
    assert schedules and logits, "no logits are recorded"
    yield from names_are(run.tensors, (*known, *logits))
    for n in schedules:
        recorded = run.expected[f"steps_{n}"]["per_expression"]
        yield Check(f"steps_{n} queries", lambda r=recorded: same(sorted(r), sorted("/".join(q) for q in queries)))
    for video in run.videos:
        yield Check(f"{video}.vae_input", lambda v=video: near(run.pixels(v), run.tensors[f"{v}.vae_input"], abs=1e-6))
    for query in queries:
        yield Check(
            f"{query[0]}.{query[1]}.gt",
            lambda q=query: same(run.truth(q), unpack(run.tensors[f"{q[0]}.{q[1]}.gt"], run.size(q[0])[0])),
        )
    for n in schedules:
        for query in queries:
            yield from _mask_checks(run, n, query)
        yield from _score_checks(run, n, run.expected[f"steps_{n}"])
