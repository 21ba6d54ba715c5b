"""The bundled configs: lists them, copies them, and finds one by name if no file has that name."""

import difflib
import os
import shutil
from pathlib import Path

import flowmask
from flowmask.launch.console import err
from flowmask.models.errors import ConfigError
from flowmask.models.files import move_new
from flowmask.models.folders.scratch import scratch

BUNDLED = Path(flowmask.__file__).resolve().parent / "configs"


def find_config(asked: Path) -> Path:
    """The file of this name, else the bundled config of this name; a line on stderr then says so.

    The name of a bundled config is its path below `configs/`, as `flowmask configs` lists it, with or without
    `configs/` and `.yaml`. Raises ConfigError with the nearest names if there is none.
    """
    if asked.is_file():
        return asked
    if found := bundled_of(asked):
        return found
    known = [name.with_suffix("").as_posix() for name in bundled()]  # with `.yaml` all names would look similar
    near = difflib.get_close_matches(_inside(asked).with_suffix("").as_posix(), known, n=3, cutoff=0.5)
    names = " or ".join(f"{name}.yaml" for name in near)
    fix = f"did you mean {names}?" if near else "`flowmask configs` lists the bundled ones"
    raise ConfigError(f"config {asked} does not exist; {fix}")


def bundled_of(asked: Path) -> Path | None:
    """The bundled config of this name, with a line about it on stderr; None if there is none."""
    inside = _inside(asked)
    for name in () if asked.is_absolute() or not inside.name else (inside, inside.with_name(f"{inside.name}.yaml")):
        if (BUNDLED / name).is_file() and ".." not in name.parts:
            err.print(f"{asked} does not exist here; using the bundled configs/{name}", style="dim")
            return BUNDLED / name
    return None


def _inside(asked: Path) -> Path:
    """The path below `configs/`, if the name begins with `configs/`."""
    return Path(*asked.parts[1:]) if asked.parts[:1] == ("configs",) else asked


def bundled() -> dict[Path, str]:
    """Each bundled config by its path below configs/, with its first line."""
    found = sorted(BUNDLED.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(BUNDLED): _first_line(path) for path in found}


def copy_configs(folder: Path) -> list[Path]:
    """Copy all bundled configs to `folder`; returns their paths. Raises ConfigError before it would replace a file."""
    targets = {name: folder / name for name in bundled()}
    missing = {name: target for name, target in targets.items() if not _is_copy(target, of=BUNDLED / name)}
    for target in missing.values():
        if os.path.lexists(target):
            raise _is_there(target)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder) as place:
        for name, target in missing.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(BUNDLED / name, place / name.name)
            try:
                move_new(place / name.name, target)
            except FileExistsError as error:
                raise _is_there(target) from error
    return list(targets.values())


def _is_copy(target: Path, *, of: Path) -> bool:
    """Whether a file is already a copy of the bundled one."""
    return target.is_file() and not target.is_symlink() and target.read_bytes() == of.read_bytes()


def _is_there(target: Path) -> ConfigError:
    return ConfigError(f"{target} already exists and differs; give --copy another folder")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
