"""Imports of libraries without what FlowMask does not use of them."""

from typing import Any

import pytest
import torch

from flowmask.models.process import compiling_later


def test_a_function_that_a_library_compiles_is_compiled_when_it_is_first_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def compile_now(function: Any, **options: Any) -> Any:
        asked.append((function.__name__, options))
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_later():

        @torch.compile(dynamic=True)
        def double(x: int) -> int:
            return 2 * x

        @torch.compile
        def half(x: int) -> int:
            return x // 2

    assert not asked and double.__name__ == "double" and torch.compile is compile_now
    assert (double(1), double(2), half(8)) == (102, 104, 104)
    assert asked == [("double", {"dynamic": True}), ("half", {})]


def test_an_import_that_fails_leaves_torch_as_it_was() -> None:
    before = torch.compile
    with pytest.raises(ImportError), compiling_later():
        raise ImportError
    assert torch.compile is before
