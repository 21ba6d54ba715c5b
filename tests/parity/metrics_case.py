"""J and F of every recorded pair, the dilation radius and the boundary maps."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowmask.trainer.score.metrics.f import boundary, boundary_accuracy, boundary_radius
from flowmask.trainer.score.metrics.j import region_similarity
from parity.core import Check, ParitySet, names_are, near, same, unpack


def _mask(stored: Tensor, entry: Mapping[str, Any]) -> NDArray[np.bool_]:
    """A recorded mask: bits packed along the width, or plain bytes (above 0 is true)."""
    if stored.shape[-1] == entry["width"]:
        return stored.numpy() > 0
    return unpack(stored, entry["width"])


def metrics_checks(data: ParitySet) -> Iterator[Check]:
    masks, expected = data.tensors("metrics/masks.safetensors"), data.record("metrics/expected.json")
    maps = [name for name in masks if name.endswith(".gt_boundary")]
    pairs = [f"{name}.{side}" for name in expected for side in ("gt", "pred")]
    assert expected and maps, "nothing is recorded"
    yield from names_are(masks, (*pairs, *maps))
    for name, entry in expected.items():
        truth, predicted = (_mask(masks[f"{name}.{side}"], entry) for side in ("gt", "pred"))
        yield Check(f"{name}.height", lambda m=truth, e=entry: same(m.shape[-2], e["height"]))
        if isinstance(entry["J"], list):
            yield from _clip(name, entry, truth, predicted)
            continue
        yield Check(f"{name}.J", lambda t=truth, p=predicted, e=entry: near(region_similarity(t, p), e["J"], abs=1e-12))
        yield Check(f"{name}.F", lambda t=truth, p=predicted, e=entry: near(boundary_accuracy(t, p), e["F"], abs=1e-12))
        yield Check(
            f"{name}.dilation_radius",
            lambda e=entry: same(boundary_radius(e["height"], e["width"]), e["dilation_radius"]),
        )
    for name in maps:
        case = name.removesuffix(".gt_boundary")
        truth = _mask(masks[f"{case}.gt"], expected[case])
        yield Check(name, lambda t=truth, n=name, c=case: same(boundary(t), unpack(masks[n], expected[c]["width"])))


def clip_scores(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """J and F of each frame."""
    pairs = list(zip(truth, predicted, strict=True))
    return [region_similarity(*pair) for pair in pairs], [boundary_accuracy(*pair) for pair in pairs]


def _clip(
    name: str, entry: Mapping[str, Any], truth: NDArray[np.bool_], predicted: NDArray[np.bool_]
) -> Iterator[Check]:
    scores = dict(zip("JF", clip_scores(truth, predicted)))
    for key, ours in scores.items():
        yield Check(f"{name}.{key} frames", lambda k=key, o=ours: same(len(o), len(entry[k])))
        for i in range(len(entry[key])):
            yield Check(f"{name}.{key}[{i}]", lambda k=key, o=ours, i=i: near(o[i], entry[k][i], abs=1e-12))
        yield Check(f"{name}.{key}_mean", lambda k=key, o=ours: near(np.mean(o), entry[f"{k}_mean"], abs=1e-12))
