"""Frame sizes for evaluation and training, and the rounding up of other sizes."""

import re
from collections.abc import Callable, Iterator, Mapping

import torch

from flowmask.data_pipeline.clip.pixels import check_shape, eval_size, train_size
from flowmask.models.errors import DataError
from parity.core import Check, ParitySet, names_are, near, same

EVAL_MULTIPLE, TRAIN_MULTIPLE = 16, 32
ORIGINAL = {"orig_w", "orig_h"}


def _size(key: str, width: int, height: int) -> tuple[int, int]:
    """Our (width, height) under the rule in a key of the table."""
    if match := re.fullmatch(r"eval_box_(\d+)x(\d+)", key):
        return eval_size(width, height, width=int(match[1]), height=int(match[2]), multiple=EVAL_MULTIPLE)
    if match := re.fullmatch(r"train_short(\d+)_max(\d+)", key):
        short, long = int(match[1]), int(match[2])
        return train_size(width, height, short_side=short, long_side=long, multiple=TRAIN_MULTIPLE)
    assert key == "check_shape", f"unknown rule {key}"
    raised = check_shape(torch.zeros(1, 1, 1, height, width), multiple=EVAL_MULTIPLE)
    return raised.shape[-1], raised.shape[-2]


def _agrees(size: Callable[[], tuple[int, int]], want: Mapping[str, int]) -> None:
    recorded = (want["w"], want["h"])
    try:
        ours = size()
    except DataError as refusal:
        assert 0 in recorded and f" {want['w']}x{want['h']}:" in str(refusal), f"{refusal}; recorded {recorded}"
    else:
        same(ours, recorded)


def pixels_checks(data: ParitySet) -> Iterator[Check]:
    table, io = data.record("resize/table.json"), data.tensors("resize/check_shape.safetensors")
    rules = {key for row in table for key in row if key not in ORIGINAL}
    kinds = {key.split("_")[0] for key in rules}
    assert kinds == {"eval", "train", "check"}, f"the table has the rules {sorted(rules)}"
    for row in table:
        width, height = row["orig_w"], row["orig_h"]
        for key in sorted(rules & row.keys()):
            yield Check(
                f"table.{width}x{height}.{key}",
                lambda k=key, w=width, h=height, row=row: _agrees(lambda: _size(k, w, h), row[k]),
            )
        always = {key for key in rules if key != "check_shape"}
        yield Check(f"table.{width}x{height} rules", lambda row=row, a=always: same(sorted(a - row.keys()), []))
    yield from names_are(io, ("input", "output"))
    yield Check("check_shape.output", lambda: near(check_shape(io["input"]), io["output"], abs=1e-6))
