"""Docstrings give the shape of each tensor, by the legend of models/__init__.py."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "data_pipeline", "trainer")
SOURCES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TENSOR = re.compile(r"\b(Tensor|NDArray|ndarray)\b")
# `[B 16 f h w]`, but not `dict[str, int]`; or the words for no shape, a named shape or any shape.
SHAPE = re.compile(r"(?<![\w\"'])\[[\w.*+-][^\[\]\n\"',]*\]|\bscalars?\b|\bof [\w`' ]{1,30}\bshapes?\b")
# Latents and pixels can have the same shape, so the docstring must name the space too.
SPACES = {
    r"f h w\]": r"\b(raw|norm|velocity|velocities|standard normal|path)\b",
    r"\bF H W( 3)?\]": r"\b(bool|rgb8|uint8|signed|-1\.\.1|logits|prob|float|float32)\b",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Told(NamedTuple):
    """A public name that is or handles a tensor, and its documentation."""

    place: str
    said: str


class Source(NamedTuple):
    lines: list[str]
    tree: ast.Module


@cache
def read(path: Path) -> Source:
    text = (ROOT / path).read_text()
    return Source(text.splitlines(), ast.parse(text))


def comment(path: Path, node: ast.stmt) -> str:
    """The trailing comment of a statement and the comment lines right above it."""
    lines, first = read(path).lines, node.lineno - 1
    above = first
    while lines[above - 1].lstrip().startswith("#"):
        above -= 1
    return "\n".join(line.partition("#")[2] for line in lines[above : node.end_lineno])


@cache
def aliases(path: Path) -> frozenset[str]:
    """Names of tensor types that a file makes or imports, except those whose comment gives the shape."""
    found: set[str] = set()
    for node in ast.walk(read(path).tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowmask."):
            file = Path(*node.module.split(".")[1:]).with_suffix(".py")
            known = aliases(file) if file in SOURCES else frozenset()
            found |= {alias.asname or alias.name for alias in node.names if alias.name in known}
    for node in read(path).tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                if is_tensor(value, found) and not SHAPE.search(comment(path, node)):
                    found.add(name)
    return frozenset(found)


def is_tensor(annotation: ast.expr, names: Iterable[str]) -> bool:
    """Whether a type holds a tensor, directly or by one of these names."""
    text = ast.unparse(annotation)
    return bool(TENSOR.search(text)) or any(re.search(rf"\b{name}\b", text) for name in names)


def handles_tensors(path: Path, function: Function) -> bool:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    types = [function.returns, *(arg.annotation for arg in arguments if arg)]
    return any(is_tensor(one, aliases(path)) for one in types if one)


def is_public(name: str) -> bool:
    return not name.startswith("_") or name.endswith("__")


CLASSES = {node.name: node for path in SOURCES for node in read(path).tree.body if isinstance(node, ast.ClassDef)}


def docstring(name: str, owner: ast.ClassDef | None, function: Function | None = None) -> str:
    """A function's docstring; an override without one has the docstring of the method that it overrides."""
    methods = [node for node in owner.body if isinstance(node, Function) and node.name == name] if owner else []
    for said in map(ast.get_docstring, [function] if function else methods):
        if said:
            return said
    if owner is None:
        return ""
    if name == "__init__":
        return ast.get_docstring(owner) or ""
    bases = [CLASSES[base.id] for base in owner.bases if isinstance(base, ast.Name) and base.id in CLASSES]
    return next((said for base in bases if (said := docstring(name, base))), "")


def public_tensors(path: Path, body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[Told]:
    """Functions, methods and fields of public classes."""
    for node in body:
        match node:
            case ast.ClassDef() if is_public(node.name):
                yield from public_tensors(path, node.body, node)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if is_public(node.name) and handles_tensors(path, node):
                yield Told(f"{path}:{node.lineno} {node.name}", docstring(node.name, owner, node))
            case ast.AnnAssign(target=ast.Name(id=name)) if owner and is_public(name):
                if is_tensor(node.annotation, aliases(path)):
                    whole = ast.get_docstring(owner) or ""
                    lines = [line for line in whole.splitlines() if re.search(rf"\b{name}\b", line)]
                    yield Told(f"{path}:{node.lineno} {owner.name}.{name}", "\n".join([comment(path, node), *lines]))


@cache
def tensors_of(room: str) -> list[Told]:
    return [told for path in SOURCES if path.parts[0] == room for told in public_tensors(path, read(path).tree.body)]


@pytest.mark.parametrize("room", ROOMS)
def test_whatever_takes_or_gives_a_tensor_says_its_shape(room: str) -> None:
    assert len(tensors_of(room)) > 20
    assert not [told.place for told in tensors_of(room) if not SHAPE.search(told.said)]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("shape", SPACES)
def test_a_shape_of_two_meanings_says_its_space(room: str, shape: str) -> None:
    shaped = [told for told in tensors_of(room) if re.search(shape, told.said)]
    assert shaped
    assert not [told.place for told in shaped if not re.search(SPACES[shape], told.said, re.IGNORECASE)]


@pytest.mark.parametrize("said", ["[B 16 f h w]", "bool [H W]", "[... F ...]", "scalar", "of any shape", "of `shape`"])
def test_a_shape_is_seen(said: str) -> None:
    assert SHAPE.search(said)


@pytest.mark.parametrize("said", ["", "dict[str, Tensor]", "plan[step]", "in [0, 1)", '{"size": [H, W]}', "the shape"])
def test_other_brackets_are_no_shape(said: str) -> None:
    assert not SHAPE.search(said)
