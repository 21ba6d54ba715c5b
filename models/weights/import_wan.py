"""`flowmask import wan`: converts Wan2.1's original files to a folder in the diffusers layout, bit for bit.

Takes the whole original folder, or one file of one part; ComfyUI's prefix of the names is removed. Refuses
missing, unexpected and reshaped tensors, non-finite numbers, pickles with more than tensors, and a target
that exists.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowmask.models.errors import ConfigError, WeightsError, help_of_disk
from flowmask.models.files import move_new
from flowmask.models.folders.scratch import scratch
from flowmask.models.strict import SafetensorsFolder, check_shapes, read_json, refuse_not_finite
from flowmask.models.weights.foreign import PREFIXES, refuse_other_kinds, refuse_two_experts
from flowmask.models.weights.original import DIT, PARTS, TOKENIZER, TOKENIZER_FOLDER, OriginalPart, Shapes
from flowmask.models.weights.pickled import plain_tensors, read_pickle
from flowmask.models.weights.tiny_wan import PARTS as CLASSES
from flowmask.models.weights.tiny_wan import SCHEDULER, write_json

SHARD_BYTES = 2 << 30  # a shard's bytes are in memory twice during writing
_FIX = "Give the folder of Wan2.1's original files, or one of its files"
_SUFFIX = ".safetensors"
Read = Callable[[str], Tensor]  # name -> tensor of any shape


def import_wan(source: Path, out: Path, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Write a new folder `out` in the diffusers layout: all parts of a folder, or the one part of a file.

    source: the folder published by Wan-AI without -Diffusers in its name; or a .safetensors or .pth file of the DiT,
    VAE or UMT5. UserError in one line for anything that does not fit; then nothing is left behind.
    """
    if not source.exists():
        raise WeightsError(f"{source} does not exist. {_FIX}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent) as place:
        if os.path.lexists(out):
            raise ConfigError(f"{out} is already there; remove it or give another folder")
        made = place / out.name
        try:
            (_import_folder if source.is_dir() else _import_file)(source, made, say)
        except SafetensorError as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"cannot write {out}: {why}; {help_of_disk(error)}") from error
        move_new(made, out)


def _import_folder(source: Path, out: Path, say: Callable[[str], None]) -> None:
    refuse_two_experts(source)
    if (source / DIT.folder).is_dir():
        raise WeightsError(f"{source} is in the diffusers layout already; give it as it is (model.wan, --wan)")
    tokenizer = source / TOKENIZER_FOLDER / TOKENIZER[0]
    wanted = [*(source / part.file for part in PARTS if part is not DIT), tokenizer]
    if absent := [path for path in wanted if not path.is_file()]:
        raise WeightsError(f"{absent[0]} is missing, which Wan2.1's original folder has; download it, or give one file")
    told = read_json(source / "config.json")
    for part in PARTS:
        with _folder(source, part.file) if part is DIT else _file(source / part.file) as (shapes, read):
            where = source if part is DIT else source / part.file
            say(f"{part.folder}: {_write(part, shapes, read, told=told, out=out, where=where)} tensors")
    (out / "tokenizer").mkdir()
    for name in TOKENIZER:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, out / "tokenizer" / name)
    write_json(out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(out / "model_index.json", {"_class_name": "WanPipeline", **CLASSES})


def _import_file(source: Path, out: Path, say: Callable[[str], None]) -> None:
    with _file(source) as (shapes, read):
        part = next((part for part in PARTS if part.mark in shapes), None)
        if part is None:
            refuse_other_kinds(shapes, where=source)
            marks = ", ".join(part.mark for part in PARTS)
            raise WeightsError(f"{source} has none of the original names of Wan2.1 ({marks}). {_FIX}")
        count = _write(part, shapes, read, told={}, out=out, where=source)
    others = ", ".join(f"{name}/" for name in CLASSES if name not in (part.folder, "scheduler"))
    say(f"{part.folder}: {count} tensors; a whole folder also has {others} beside it, as a -Diffusers folder has them")


@contextmanager
def _folder(folder: Path, stem: str) -> Iterator[tuple[Shapes, Read]]:
    """Shapes by name, and a function that reads a tensor as stored."""
    with SafetensorsFolder(folder, stem) as weights:
        yield _plain(weights.shapes(), weights.stored)


@contextmanager
def _file(file: Path) -> Iterator[tuple[Shapes, Read]]:
    """As `_folder`, for one file."""
    if file.suffix == _SUFFIX:
        with _folder(file.parent, file.name.removesuffix(_SUFFIX)) as found:
            yield found
        return
    content = read_pickle(file, fix=_FIX, mapped=True)
    state = plain_tensors(content, file, where=str(file), fix=_FIX)
    yield _plain({key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__)


def _plain(shapes: Shapes, read: Read) -> tuple[Shapes, Read]:
    """The tensors without ComfyUI's prefix, if every name has it."""
    prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in shapes)), "")
    return {key.removeprefix(prefix): shape for key, shape in shapes.items()}, lambda key: read(prefix + key)


def _write(part: OriginalPart, shapes: Shapes, read: Read, *, told: Mapping[str, Any], out: Path, where: object) -> int:
    """Check a part strictly and write its folder; returns the number of its tensors."""
    if part is DIT:
        refuse_other_kinds(shapes, where=where)
    try:
        model = part.model(shapes, told)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        said = " ".join(str(error).split())[:200]
        raise WeightsError(f"{where} is no {part.folder} of Wan2.1 ({type(error).__name__}: {said}). {_FIX}") from None
    names, state = part.names(model), model.state_dict()
    expected = {original: tuple(state[ours].shape) for original, ours in names.items()}
    check_shapes(expected, shapes, where=where, fix=_FIX)
    folder = out / part.folder
    folder.mkdir(parents=True)
    _write_config(model, folder)
    tensors = {ours: read(original) for original, ours in names.items()}
    refuse_not_finite(tensors.items(), where=where, fix="get the file again")
    _write_shards(tensors, folder, part.stem)
    return len(tensors)


def _write_config(model: Any, folder: Path) -> None:
    if hasattr(model, "save_config"):  # diffusers'
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, stem: str) -> None:
    """One file, or shards and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(held.nbytes for held in (*shards[-1].values(), tensor)) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    files = [f"{stem}-{n:05}-of-{len(shards):05}{_SUFFIX}" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / (file if len(shards) > 1 else stem + _SUFFIX), metadata={"format": "pt"})
    if len(shards) > 1:
        homes = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": homes}
        (folder / f"{stem}{_SUFFIX}.index.json").write_text(json.dumps(index, indent=2) + "\n")
