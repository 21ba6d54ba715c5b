"""Plans of one process share their passes: equal modules and shapes are run on the meta device once."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from flowmask.launch.plan import one_pass, settings, train
from flowmask.models.cost.dry_run import Pass

# All that a pass depends on, beside its arguments. A key that is missing here makes a test of that key fail.
_DECIDES: Any = {
    "objective": True,
    "lora": True,
    "model": True,
    "train": {"precision", "micro_batch", "sequence_parallel"},
}


@pytest.fixture(scope="session", autouse=True)
def shared_passes() -> Iterator[None]:
    measured: dict[str, Pass] = {}

    def micro_batch_pass(job: Any, shapes: Any, shape: Any, **options: Any) -> Pass:
        chosen = job.model_dump(mode="json", include=_DECIDES)
        key = json.dumps([chosen, repr(shapes), str(shape), options], sort_keys=True)
        if key not in measured:
            measured[key] = one_pass.micro_batch_pass(job, shapes, shape, **options)
        return measured[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, settings):
            patch.setattr(module, "micro_batch_pass", micro_batch_pass)
        yield
