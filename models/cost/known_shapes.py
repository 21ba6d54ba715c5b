"""Operators on the meta device, each asked once for the shape of its result: torch computes most shapes in Python.

A pass of a deep model asks for the same few hundred shapes tens of thousands of times.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # of a contiguous storage: shape, strides, dtype
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _UnknownError(Exception):
    """An argument whose part in the results is not known here."""


@dataclass(frozen=True)
class _New:
    """The results of an operator, if all are new tensors."""

    layouts: tuple[_Layout | None, ...]
    several: bool

    def make(self) -> Any:
        made = tuple(None if layout is None else _empty(layout) for layout in self.layouts)
        return made if self.several else made[0]


class KnownShapes(TorchDispatchMode):
    """Inside the block, a result whose shape is known is an empty tensor of that shape; views are left to torch.

    A mode outside it sees the same shapes, strides, dtypes and storages.
    """

    _known: ClassVar[dict[Hashable, _New | None]] = {}  # for all passes of a process; None: not new tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        try:
            key = self._question(func, args, named)
        except _UnknownError:
            key = None
        if known := self._known.get(key):
            return known.make()
        result = func(*args, **named)
        if key is not None and key not in self._known:
            self._known[key] = _new(result, (args, named))
        return result

    def _question(self, func: Any, args: Any, named: dict[str, Any]) -> Hashable:
        """All that the layout of an operator's results depends on; None if they are not new tensors."""
        if not _may_give_new_tensors(func):
            return None
        return func, torch.get_default_dtype(), _key(args), _key(named)


@cache
def _may_give_new_tensors(func: Any) -> bool:
    schema = func._schema
    results = schema.returns
    return not schema.is_mutable and bool(results) and all(result.alias_info is None for result in results)


def _key(value: Any) -> Hashable:
    """What a result's layout depends on in an argument. Raises _UnknownError for another kind, such as a generator."""
    if isinstance(value, Tensor):
        if not value.is_meta or value.is_complex() or type(value) not in (Tensor, nn.Parameter):
            raise _UnknownError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    if type(value) in _PLAIN:
        return type(value), value  # 1, 1.0 and True are equal, but give other dtypes
    raise _UnknownError


def _new(result: Any, given: Any) -> _New | None:
    """How to make `result` again; None if a part of it is no new tensor with a storage of its size."""
    several = isinstance(result, list | tuple)
    parts = tuple(result) if several else (result,)
    storages = {part.untyped_storage()._cdata for part in tree_iter(given) if isinstance(part, Tensor)}
    layouts: list[_Layout | None] = []
    for part in parts:
        if part is None:
            layouts.append(None)
            continue
        if type(part) is not Tensor or not part.is_meta or part.is_complex():
            return None
        layout = (tuple(part.shape), part.stride(), part.dtype)
        storage = part.untyped_storage()
        if storage._cdata in storages or storage.nbytes() != _empty(layout).untyped_storage().nbytes():
            return None
        storages.add(storage._cdata)
        layouts.append(layout)
    return _New(tuple(layouts), several)


def _empty(layout: _Layout) -> Tensor:
    shape, strides, dtype = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
