"""Pickled weights of other projects, read without executing their content.

Allows tensors with their own numbers, containers and argparse.Namespace. Refuses everything else, archives that
unpack to more than their size, and tensors with more numbers than the file has.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmask.models.errors import WeightsError
from flowmask.models.stored.regular import open_regular


def read_pickle(path: Path, *, fix: str, mapped: bool = False) -> dict[str, Any]:
    """The dictionary in a file; nothing is executed. WeightsError in one line for anything else.

    fix: advice for a file of another kind; mapped: tensors stay in the file if it has torch's zip layout
    """
    try:
        os.close(open_regular(path))
        packed = zipfile.is_zipfile(path)
        if packed:
            _refuse_packed(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and packed)
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist; correct the path") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"asks for {wanted[1]}, which could execute code" if wanted else "is no plain checkpoint"
        raise WeightsError(f"{path} {reason}; refused. {fix}") from None
    except Exception as error:  # noqa: BLE001 - torch raises anything on a damaged file
        raise WeightsError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); get it again") from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary. {fix}")
    return dict(content)


def plain_tensors(value: Any, path: Path, *, where: str, fix: str) -> dict[str, Tensor]:
    """A dictionary of float tensors, of any shape, from `path`; WeightsError for anything else.

    Also refuses tensors that take more than twice the file's bytes: a stride of 0 repeats one number without limit.
    where: the dictionary's name in errors
    """
    if not isinstance(value, Mapping):
        raise WeightsError(f"{where} is missing: the file holds no weights. {fix}")
    wrong = [str(key) for key, item in value.items() if not isinstance(key, str) or not _is_plain(item)]
    if wrong:
        raise WeightsError(f"{where} has entries that are no tensors ({', '.join(wrong[:3])[:200]}). {fix}")
    if sum(tensor.numel() * tensor.element_size() for tensor in value.values()) > 2 * path.stat().st_size:
        raise WeightsError(f"{where} has tensors that are larger than the file. {fix}")
    return dict(value)


def _refuse_packed(path: Path) -> None:
    """ValueError for an archive with more bytes than the file: torch does not compress."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")


def _is_plain(item: object) -> bool:
    """Whether an entry is a tensor that stores its own numbers."""
    held = isinstance(item, Tensor) and item.layout == torch.strided and item.device.type == "cpu"
    return held and item.is_floating_point()  # type: ignore[attr-defined]
