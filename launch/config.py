"""Reads a YAML config and dotted overrides into one strict, frozen job. Every error is one line.

Order of strength: defaults < file < overlays (overlay.py) < command line. Each section is defined in the folder that
reads it; this file defines the `launch` section.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from flowmask.launch.configs import bundled_of, find_config
from flowmask.launch.nearest import nearest
from flowmask.launch.scalars import at_home, parse_plain
from flowmask.models.errors import ConfigError
from flowmask.models.safe.secrets import masked_line, masked_option, masked_uri
from flowmask.models.safe.words import has_control, printable
from flowmask.models.stored.typed import refuse_deep_yaml
from flowmask.trainer.objectives import of_one_kind

# Sections that may hold secrets: in these, `${oc.env:NAME}` is saved as written.
KEPT = (".tracking.uri", ".launch.setup", ".launch.srun_args", ".launch.sbatch_args")
_MAPPING = "tag:yaml.org,2002:map"
_MOST_PROBLEMS = 8  # in one message


Model = TypeVar("Model", bound=BaseModel)


def load_job(path: Path, kind: type[Model], overrides: Sequence[str] = ()) -> Model:
    """Read `path`, apply `key.path=value` overrides, and validate the result as `kind`.

    Raises ConfigError with one line that names the key, its value and the allowed values.
    """
    return validate(read_tree(path, overrides), kind, origin=str(path))


def read_tree(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    over: Callable[[DictConfig], DictConfig] = lambda config: config,
    refuse: Callable[[Mapping[Any, Any]], None] = lambda keys: None,
) -> dict[Any, Any]:
    """The keys of `path` with overrides applied; not validated yet.

    over: called with the keys of the file; returns them with overlays applied
    refuse: called with the keys before any ${...} is filled in; raises for a config of another kind
    """
    path = find_config(path)
    with readable(path):
        config = over(load_yaml(path))
        for item in overrides:
            set_key(config, *split_override(item), merge=True, where=f"override {item!r}")
        refuse(as_written(config))
        return resolved(config)


def as_written(config: DictConfig) -> dict[Any, Any]:
    """The keys as plain data. Every ${...} stays as written."""
    tree: Any = OmegaConf.to_container(config)
    return dict(tree)


def resolved(config: DictConfig) -> dict[Any, Any]:
    """The keys as plain data with ${...} filled in, except `${oc.env:...}` in sections that may hold secrets (KEPT).

    Those stay as written, so that no copy of the config holds the value. They are filled in at use.
    """
    tree: Any = OmegaConf.to_container(config, resolve=True)
    _keep_references(tree, OmegaConf.create(_unread(OmegaConf.to_container(config))))
    return dict(tree)


def _unread(value: Any) -> Any:
    """Escape every `${oc.env:...}`, so that resolving returns the text as written."""
    if isinstance(value, dict):
        return {key: _unread(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unread(item) for item in value]
    return re.sub(r"(?<!\\)\$\{oc\.env:", r"\\${oc.env:", value) if isinstance(value, str) else value


def _keep_references(tree: Any, unread: Any, path: str = "") -> None:
    """Replace the sections of KEPT in `tree` by those of `unread`."""
    for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
        here = f"{path}.{key}"
        if here.endswith(KEPT):
            found = unread[key]
            tree[key] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        elif isinstance(item, dict | list) and OmegaConf.is_config(inner := unread[key]):
            _keep_references(item, inner, here)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Inside the block, an error of YAML or OmegaConf becomes a ConfigError that names the file."""
    try:
        yield
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {_one_line(error)}") from error


def load_yaml(path: Path, *, above: tuple[Path, ...] = ()) -> DictConfig:
    """The keys of a file, merged over those of its `base`: a path from its folder, else a bundled config's name."""
    refuse_deep_yaml(path.read_bytes())
    root = parse_plain(path.read_text(encoding="utf-8"), where=f"config {path}")
    if root is None or root.tag != _MAPPING or not root.value:
        raise ConfigError(f"config {path} holds no keys; it must be a YAML mapping")
    written = OmegaConf.load(path)
    assert isinstance(written, DictConfig)
    loaded = OmegaConf.create(at_home(as_written(written)))
    if isinstance(objective := loaded.get("objective"), DictConfig):
        loaded["objective"] = of_one_kind(objective)
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    below = (path.parent / str(base)).resolve()
    if not below.is_file():
        below = bundled_of(Path(str(base))) or below
    if not below.is_file() or below in above:
        why = "is based on itself" if below in above else "does not exist"
        fix = f"give a path from {path.parent}, or a name that `flowmask configs` lists"
        raise ConfigError(f"config {path}: base is {base}, which {why}; {fix}")
    merged = OmegaConf.merge(load_yaml(below, above=(*above, path.resolve())), loaded)
    assert isinstance(merged, DictConfig)
    return merged


def validate(data: dict[Any, Any], kind: type[Model], *, origin: str) -> Model:
    """`data` as a `kind`. Raises ConfigError with one line that names every wrong key."""
    if strange := next(_with_control(data), None):
        key, text = strange
        said = _quoted(key, text)
        raise ConfigError(f"{origin}: {key} is {said}; no value may hold a line break or a control character")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_explain(kind, dict(item)) for item in error.errors(include_url=False)]
        raise ConfigError(f"{origin}: {_all_of(problems)}") from error


def _with_control(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text with a control character, by its dotted key: it could break a script, a log or a terminal."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _with_control(str(name), f"{key}.{name!s}".strip("."))
            yield from _with_control(item, f"{key}.{name!s}".strip("."))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _with_control(item, f"{key}.{place}")
    elif isinstance(value, str | Path) and has_control(str(value)):
        yield printable(key), str(value)


def split_override(item: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE, the value parsed as YAML. ${...} is filled in later, from the whole config."""
    key, equals, text = item.partition("=")
    if not key or not equals:
        raise ConfigError(f"override {item!r} is not KEY=VALUE, for example train.lr=1e-4")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        parse_plain(text, where=f"override of {key}")
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"override of {key}: its value is not valid YAML ({_problem(error)}); quote it") from error
    return key, at_home(parsed["value"])


def set_key(config: DictConfig, key: str, value: Any, *, merge: bool = False, where: str) -> None:
    """Set a dotted key; a number in it is a list index. merge: a section is merged into the existing one."""
    try:
        OmegaConf.update(config, key, value, merge=merge, force_add=True)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{where}: {key} does not fit the file; change a list as a whole or by index, as in data.0.root=..."
        ) from error


def _explain(kind: type[BaseModel], item: dict[str, Any]) -> str:
    """One validation error of pydantic as one line."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {key}{nearest(kind, location)}"
        case "missing":
            return f"key {key} is missing; set it in the file or with {key}=VALUE"
        case "value_error":
            message = _one_line(item["ctx"]["error"])
            return message if not key or key in message else f"{key}: {message}"
        case _:
            return f"{key} is {_quoted(key, item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _all_of(problems: Sequence[str]) -> str:
    """Every problem in one line, numbered if there are several."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) == 1:
        return distinct[0]
    listed = " ".join(f"({number}) {problem}" for number, problem in enumerate(distinct[:_MOST_PROBLEMS], start=1))
    more = f" and {len(distinct) - _MOST_PROBLEMS} more" if len(distinct) > _MOST_PROBLEMS else ""
    return f"{len(distinct)} problems: {listed}{more}"


def _quoted(key: str, value: Any) -> str:
    """A wrong value for display: a key that may hold secrets shows no value."""
    secret = any(f".{key}.".startswith(f"{kept}.") for kept in KEPT)
    return masked_option(masked_line(masked_uri(repr(value)))) if secret else repr(value)


def _problem(error: BaseException) -> str:
    """YAML's error message without the quoted text, which may hold secrets."""
    return _one_line(getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
