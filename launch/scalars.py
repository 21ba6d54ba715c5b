"""Values that YAML reads in another way than people: refused, or read in the people's way."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flowmask.models.errors import ConfigError

# Octal, and numbers to the base of sixty: `010` is 8 and `1:30` is 90.
_TWO_READINGS = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


def parse_plain(text: str, *, where: str) -> yaml.Node | None:
    """The root of a YAML text, None if it is empty.

    ConfigError for the first plain number in it that YAML reads as another number than people do.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for node in _scalars(root):
        if node.style is None and node.tag.endswith((":int", ":float")) and _TWO_READINGS.fullmatch(node.value):
            number = yaml.safe_load(node.value)
            at = f"{where}, line {node.start_mark.line + 1}: YAML reads {node.value} as {number}"
            if ":" in node.value:
                raise ConfigError(f"{at}, to the base of 60; write the number you mean, in the unit of the key")
            raise ConfigError(f"{at}; write {number} for the number or '{node.value}' in quotes for the text")
    return root


def _scalars(root: Any) -> Iterator[yaml.ScalarNode]:
    """Every scalar once: an alias is the node that it names; a node may contain itself, or another node many times."""
    seen, left = set[int](), [root]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif isinstance(node, yaml.MappingNode):
            left.extend(one for pair in node.value for one in pair)
        elif isinstance(node, yaml.SequenceNode):
            left.extend(node.value)


def at_home(value: Any) -> Any:
    """The value, with `~/` at the beginning of every text replaced by the home folder, as in a shell."""
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value
