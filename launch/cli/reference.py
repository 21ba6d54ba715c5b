"""`flowmask config`: every key of a kind of config, with type, default and meaning, as a page and as JSON schema.

Everything is read from the config classes, so it is always up to date.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table
from rich.text import Text

from flowmask.launch.console import out as console
from flowmask.models.config import MayChangeOnResume
from flowmask.models.errors import ConfigError
from flowmask.trainer.objectives import objective_class, objective_names
from flowmask.trainer.objectives.base import ObjectiveConfig

_UNITS = {  # end of a key's name -> unit
    "s": "seconds",
    "ms": "milliseconds",
    "min": "minutes",
    "gb": "GB",
    "px": "pixels",
    "steps": "steps",
    "epochs": "epochs",
    "tflops": "TFLOP/s",
    "frames": "frames",
    "bytes": "bytes",
}

_LISTS = ("mix", "held_out", "stages", "rows")  # lists of sections
_HEAD = """# Keys of `flowmask {name}`

Made by `python tools/config_reference.py`; `flowmask config {name} [KEY]` prints the same in a terminal. "may change":
a resumed run may have a new value. [{name}.json]({name}.json) is the JSON schema: an editor
completes and checks a YAML that begins with `# yaml-language-server: $schema=PATH/{name}.json`.
"""
_TITLES = ("| key | type | default | resume | meaning |", "|---|---|---|---|---|")


@dataclass(frozen=True)
class ConfigKey:
    """A key in the form that a person writes. default: as in YAML; empty for a required key."""

    section: str
    name: str
    type: str
    default: str
    meaning: str
    may_change: bool


def kinds() -> dict[str, type[BaseModel]]:
    """The kinds of config for `flowmask config`, by the name of the command that reads them."""
    from flowmask.launch.curriculum.stages import CurriculumConfig
    from flowmask.launch.jobs import KINDS
    from flowmask.launch.reproduce.study import StudyConfig

    return {**KINDS, "curriculum": CurriculumConfig, "reproduce": StudyConfig}


def keys_of(kind: type[BaseModel], section: str = "", *, title: str = "", resumes: bool = False) -> Iterator[ConfigKey]:
    """Every key, in the order of the sections; the kinds of objective follow each other.

    section: dotted prefix of the keys; title: name of the section, if not the prefix; resumes: all keys may change
    """
    for name, field in kind.model_fields.items():
        changes, key = resumes or MayChangeOnResume in field.metadata, f"{section}.{name}".strip(".")
        sections = list(_sections(name, field))
        if not sections or name in _LISTS:
            default = "" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
            yield ConfigKey(title or section, key, _said(field), default, _meaning(name, field), changes)
        elif NoneType in get_args(field.annotation) and field.description:
            default = _yaml(field.get_default(call_default_factory=True))
            yield ConfigKey(title or section, key, "section | null", default, field.description, changes)
        for inner, called in sections:
            yield from keys_of(inner, key, title=called, resumes=changes)


def _meaning(name: str, field: FieldInfo) -> str:
    """The description. The unit in the key's name is added if the description lacks it."""
    said = field.description or (ObjectiveConfig.model_fields["kind"].description if name == "kind" else "") or ""
    unit = _UNITS.get(name.rsplit("_", 1)[-1], "")
    told = unit in said or "in px" in said  # crop_min is no number of minutes
    return f"{said} ({unit})" if said and unit and not told else said


def _sections(name: str, field: FieldInfo) -> Iterator[tuple[type[BaseModel], str]]:
    """The sections that a key may hold, each with its title; "" if the title is the key."""
    if name == "objective":
        for kind in objective_names():
            yield objective_class(kind).Config, f"objective, kind: {kind}"
        return
    found = (part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel))
    yield from ((part, "") for part in [*found][:1])


def _parts(annotation: Any) -> Iterator[Any]:
    """The parts of a union, a tuple or an annotated type."""
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def _said(field: FieldInfo) -> str:
    """A type in words, with its limits."""
    limits = [
        f"{sign} {getattr(mark, name)}"
        for mark in field.metadata
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(mark, name, None) is not None
    ]
    said, null, _ = _type(field.annotation).partition(" | null")
    return " ".join([said, *([", ".join(limits)] if limits else [])]) + null


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys("null" if part is NoneType else _type(part) for part in parts))
    if origin is tuple:
        return f"list of {_type(parts[0])}" if Ellipsis in parts else f"[{', '.join(map(_type, parts))}]"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "true | false", Path: "path", dict: "mapping"}
    return names.get(annotation, "anything" if annotation is Any else getattr(annotation, "__name__", str(annotation)))


def _yaml(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, tuple):
        value = list(value)
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def page(name: str, kind: type[BaseModel]) -> str:
    """The keys of a kind of config as a page of docs/config/."""
    sections: dict[str, list[ConfigKey]] = {}
    for key in keys_of(kind):
        sections.setdefault(key.section, []).append(key)
    lines = [_HEAD.format(name=name)]
    for section, keys in sections.items():
        lines += [
            f"## {section or 'At the top'}",
            "",
            "| key | type | default | resume | meaning |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(key) for key in keys]
        lines.append("")
    return "\n".join(lines)


def _line(key: ConfigKey) -> str:
    default = f"`{key.default}`" if key.default else "must be given"
    cells = (f"`{key.name}`", key.type, default, "may change" if key.may_change else "", key.meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def schema(name: str, kind: type[BaseModel]) -> str:
    """The JSON schema of a kind of config; an objective may be any bundled kind."""
    found = kind.model_json_schema()
    if "objective" in found.get("properties", {}):
        several = [objective_class(one).Config.model_json_schema() for one in objective_names()]
        for one in several:
            found.setdefault("$defs", {}).update(one.pop("$defs", {}))
        found["properties"]["objective"] = {"anyOf": several}
    found["properties"] |= {
        "base": {
            "type": "string",
            "description": "a YAML that this file overrides: a path from this folder, or a bundled config's name",
        },
        "kind": {
            "type": "string",
            "description": "kind of the job for flowmask submit, if the keys do not determine it",
        },
    }
    return json.dumps({**found, "title": f"flowmask {name}"}, indent=1, sort_keys=True) + "\n"


def config(
    kind: Annotated[str, typer.Argument(help="cache, train, evaluate, curriculum or reproduce")],
    key: Annotated[str | None, typer.Argument(help="Only keys that contain this text")] = None,
    as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors")] = False,
) -> None:
    """List every key of a kind of config: type, default, meaning, and whether a resume may change it."""
    known = kinds()
    if kind not in known:
        raise ConfigError(f"flowmask config {kind}: this kind is unknown; known: {', '.join(known)}")
    if as_schema:
        typer.echo(schema(kind, known[kind]), nl=False)
        return
    found = [one for one in keys_of(known[kind]) if key is None or key in one.name]
    if not found:
        raise ConfigError(f"no key of {kind} contains {key!r}; `flowmask config {kind}` lists all of them")
    table = Table("key", "default", "resume", "meaning", box=None, padding=(0, 2, 0, 0))
    for one in found:
        default = one.default or "must be given"
        changes = "may change" if one.may_change else ""
        table.add_row(Text(one.name), Text(default), changes, Text(f"{one.meaning}. {one.type}"))
    console.print(table)
