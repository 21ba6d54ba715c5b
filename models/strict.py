"""Weights read lazily and assigned strictly: every key and shape must fit, or one line lists the differences.

Only safetensors is read here; a pickle can execute code (`flowrvs.py` reads the published ones safely).
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowmask.models.errors import WeightsError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import SEAL, parse_json, unseal_since
from flowmask.models.stored.size import expanded

SETTINGS_FORMAT, SETTINGS_SEALED_FROM = 2, 2  # of an export's settings
_MOST_JSON = 1 << 27  # a tokenizer has 17 MB
_MOST_SETTINGS = 100_000
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


def check_shapes(
    expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]], *, where: object, fix: str
) -> None:
    """Raise one WeightsError that counts missing, unexpected and reshaped keys and names the first few."""
    want, have = ({k: tuple(v) for k, v in side.items()} for side in (expected, found))
    missing = [k for k in want if k not in have]
    unexpected = [k for k in have if k not in want]
    reshaped = [f"{k} {have[k]} not {want[k]}" for k in want if k in have and have[k] != want[k]]
    groups = {"missing": missing, "unexpected": unexpected, "reshaped": reshaped}
    told = [f"{len(v)} {name} ({_few(v)})" for name, v in groups.items() if v]
    if told:
        raise WeightsError(f"{where} does not fit the model: {'; '.join(told)}. {fix}")


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, where: object, fix: str) -> None:
    """Copy a state dict into a module, in the module's dtype; WeightsError unless it is of the module's shapes."""
    expected = {k: v.shape for k, v in module.state_dict().items()}
    check_shapes(expected, {k: v.shape for k, v in state.items()}, where=where, fix=fix)
    module.load_state_dict(state)


def assign_strict(module: nn.Module, state: Mapping[str, Tensor], *, where: object, fix: str) -> None:
    """As `load_strict`, of the module's shapes too, but without a copy: for a module on the meta device."""
    expected = {k: v.shape for k, v in module.state_dict().items()}
    check_shapes(expected, {k: v.shape for k, v in state.items()}, where=where, fix=fix)
    module.load_state_dict(state, assign=True)


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], *, where: object, fix: str) -> None:
    """WeightsError with the first tensor, of any shape, that has NaN or an infinity; 40 ms per GB on one CPU core."""
    for name, tensor in tensors:
        if tensor.numel() and not all(math.isfinite(edge) for edge in tensor.detach().aminmax()):
            raise WeightsError(f"{where}: {name} has a number that is not finite; {fix}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a weights folder; a missing or damaged file is one WeightsError line."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing; download the folder again or correct model.wan")
    try:
        value = parse_json(read_regular(path, limit=_MOST_JSON), number=_finite)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); download it again") from None
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({_one_line(error)[:200]}); download it again") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds {type(value).__name__}, not a JSON object; download it again")
    return value


def exported_settings(settings: object, *, where: object) -> dict[str, Any]:
    """An export's settings about its weights. WeightsError if they were changed. `where` names the file."""
    try:
        if not isinstance(settings, Mapping) or expanded(settings) > _MOST_SETTINGS:
            raise ValueError("no mapping of settings")
        known = {"format": 1, **settings} if settings and SEAL not in settings else dict(settings)
        found = unseal_since(known, version="format", first=SETTINGS_SEALED_FROM, where=where) if known else {}
    except ValueError as error:
        raise WeightsError(f"{where} is damaged ({_one_line(error)[:200]}); export it again, or get it again") from None
    return {name: value for name, value in found.items() if name != "format"}


def _finite(text: str) -> float:
    """A number of JSON; ValueError for NaN, Infinity and 1e999, which Python reads."""
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"it holds {text}, which is not finite")


class SafetensorsFolder:
    """One part's tensors: `<stem>.safetensors`, or the shards named by `<stem>.safetensors.index.json`."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        self.index = index if index.is_file() else None
        self._promised: dict[str, str] | None = None
        if self.index is not None:
            self._promised = _weight_map(index)
            self.files = [folder / name for name in sorted(set(self._promised.values()))]
        elif single.is_file():
            self.files = [single]
        else:
            raise WeightsError(_nothing_to_read(folder, single))
        self._stack = ExitStack()
        self._home: dict[str, tuple[Any, Path]] = {}

    def __enter__(self) -> "SafetensorsFolder":
        try:
            for file in self.files:
                self._open(file)
            self._keep_promises()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise WeightsError(f"{file} is missing, though {self.index} names it; download that shard again")
        try:
            handle = self._stack.enter_context(opened(file))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} is damaged ({_one_line(error)}); download it again") from None
        for key in handle.keys():  # noqa: SIM118 - a handle is not a mapping
            if key in self._home:
                raise WeightsError(f"{file} repeats {key}, which another shard of {self.folder} holds")
            kind = handle.get_slice(key).get_dtype()
            if kind not in _FLOATS:
                raise WeightsError(f"{file}: {key} is stored as {kind}; only {sorted(_FLOATS)} can be loaded")
            self._home[key] = handle, file

    def _keep_promises(self) -> None:
        broken = [key for key in self._promised or () if key not in self._home]
        if broken:
            raise WeightsError(
                f"{self.index} promises {len(broken)} tensors that its shards lack ({_few(broken)}); "
                "the folder mixes two downloads: fetch it again"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""
        return {key: tuple(handle.get_slice(key).get_shape()) for key, (handle, _) in self._home.items()}

    def stored(self, key: str) -> Tensor:
        """One tensor of any shape as stored: memory-mapped, values not checked."""
        tensor: Tensor = self._home[key][0].get_tensor(key)
        return tensor

    def tensor(self, key: str, dtype: torch.dtype) -> Tensor:
        """One tensor of any shape in a dtype, copied, so nothing stays mapped; WeightsError if it is not finite."""
        file, tensor = self._home[key][1], self.stored(key).to(dtype, copy=True)
        refuse_not_finite([(key, tensor)], where=file, fix="get the file again")
        return tensor


def opened(file: Path) -> Any:
    """A .safetensors file, mapped whole; SafetensorError, OSError, or WeightsError if memory is too small."""
    try:
        return safe_open(file, framework="pt")
    except RuntimeError as error:
        raise WeightsError(
            f"{file} does not fit into memory ({_one_line(error)[:200]}); split it into shards"
        ) from None


def _weight_map(index: Path) -> dict[str, str]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise WeightsError(f"{index} has no weight_map; download it again")
    for name in mapping.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(f"{index} names {name!r}; a shard is a .safetensors file beside the index")
    return mapping


def _nothing_to_read(folder: Path, single: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern)) if folder.is_dir() else []
    if pickles:
        return f"{folder} holds pickled weights ({_few(pickles)}), which are refused; get safetensors"
    return f"{single} is missing (nor is there an index of shards); download the part or correct model.wan"


def _few(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
