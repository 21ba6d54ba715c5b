"""A forked child can compute, whatever its parent computed before; tests that fork rely on this."""

from collections.abc import Iterator

import pytest
import torch
from disturbed import FINISHED, end_of, in_child


@pytest.fixture
def busy_parent() -> Iterator[None]:
    """A process with active OpenMP threads, as after a test that trains."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.ones(1_000_000).sum() == 1_000_000
    yield
    torch.set_num_threads(before)


def test_a_fork_of_a_process_that_has_computed_in_threads_computes_too(busy_parent: None) -> None:
    assert end_of(in_child(lambda: torch.ones(1_000_000).sum())) == FINISHED
