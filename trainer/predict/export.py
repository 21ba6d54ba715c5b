"""Exports trained weights of a run in formats that other code reads; written atomically and exactly.

    diffusers     OUT/transformer (or OUT/mask_decoder: a VAE of one output channel, or a light one), OUT/flowmask.json
    flowrvs       one .pth in the layout of the published files
    safetensors   one file; its header has the conventions
    lora          a LoRA run's adapters without their base, as peft's folder, and OUT/flowmask.json

Folders also hold a model card, OUT/README.md (`trainer/predict/show/card.py`). Settings can include a presence
threshold. All formats except `lora` hold the whole model, with merged adapters. Each can be used as a source of
weights (`trainer/predict/weights.py`), with bit-identical tensors. Refuses an `out` that already exists.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flowmask.models.config import FLOW_PATH, LightDecoderConfig
from flowmask.models.decoders.either import network_of
from flowmask.models.decoders.light import SETTING
from flowmask.models.errors import ConfigError, WeightsError, help_of_disk
from flowmask.models.files import move_new
from flowmask.models.folders.scratch import scratch
from flowmask.models.lora import write_adapter
from flowmask.models.stored.sealed import sealed, to_json
from flowmask.models.strict import SETTINGS_FORMAT, assign_strict
from flowmask.models.weights.flowrvs import SETTINGS
from flowmask.models.weights.wan import WanFolder
from flowmask.trainer.predict.exported import EXPORT_SETTINGS, EXPORT_STEM, OWN_ENCODER
from flowmask.trainer.predict.inference import trained_sides
from flowmask.trainer.predict.parts import DIT, MASK_DECODER, VIDEO_DIT, Part, State
from flowmask.trainer.predict.presence import KEY, Presence, presence_in, stated
from flowmask.trainer.predict.show.card import CardFacts, write_card
from flowmask.trainer.predict.weights import (
    HOLDS,
    LoadedWeights,
    content_sha256,
    load,
    load_adapter,
    own_encoder,
    part_of,
    with_base,
)
from flowmask.trainer.state.run_folder import CHECKPOINTS
from flowmask.trainer.state.steps import is_run

Format = Literal["diffusers", "flowrvs", "safetensors", "lora"]
_SUFFIX = {"diffusers": "", "flowrvs": ".pth", "safetensors": ".safetensors", "lora": ""}
_PATHS = ("wan", "mask_decoder")  # settings with paths of the training's machine
_OWN = (*_PATHS, KEY, OWN_ENCODER, SETTING)  # settings that each export writes itself or drops


@dataclass(frozen=True)
class Exported:
    """The written file or folder, its number of parameters, the hash of their fp32 values and the part (`parts.py`)."""

    path: Path
    parameters: int
    sha256: str
    part: str


def export(
    source: str,
    *,
    format: str,
    out: Path | None = None,
    ema: bool = True,
    dtype: torch.dtype = torch.float32,
    wan: Path | None = None,
    presence: str | None = None,
) -> Exported:
    """Write the weights of a run (or of one of its steps, or of another export) in one of the formats.

    out:   default: RUN/export/NAME of the run, with the format's suffix
    ema:   the averaged weights; a flowrvs file of a DiT holds both if the source does
    dtype: float32 keeps every bit; bfloat16 is half the size
    wan:   Wan2.1 folder of the training; default: the one that the source records
    presence: a calibrated evaluation, whose threshold is stored; default: that of the source export; "none": none
    Raises UserError if something is missing, damaged or already exists.
    """
    if format not in _SUFFIX:
        raise ConfigError(f"--format is {format!r}; known formats: {', '.join(get_args(Format))}")
    target = _target(source, out, format=format)
    if (part := part_of(source)) is VIDEO_DIT and format != "diffusers":
        raise ConfigError(f"{source} trained text to video, which is exported as a Wan2.1 folder: --format diffusers")
    job = ExportJob(source, part=part, ema=ema, dtype=dtype, asked_wan=wan, presence=presence)
    writers = {"diffusers": job.diffusers, "flowrvs": job.flowrvs, "safetensors": job.safetensors, "lora": job.lora}
    return write_new(target, job, writers[format])


def write_new(target: Path, job: "ExportJob", write: Callable[[Path], None]) -> Exported:
    """Write the weights of a job into a temporary place, then rename. Raises ConfigError if `target` exists."""
    with _said(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target.parent) as place:
            if os.path.lexists(target):
                raise FileExistsError
            write(place / target.name)
            move_new(place / target.name, target)
    parameters = sum(t.numel() for t in job.loaded.state_dict.values())
    return Exported(target, parameters, job.loaded.sha256, job.part.name)


def _target(source: str, out: Path | None, *, format: str) -> Path:
    run, suffix = Path(source), _SUFFIX[format]
    if out is None:
        if not (run / CHECKPOINTS).is_dir():
            why = "is not a run folder, so its export has no default path; give --out"
            raise ConfigError(f"{source} {why if run.exists() else 'does not exist; give a run, or another export'}")
        out = run / "export" / f"{run.resolve().name}{'_lora' if format == 'lora' else suffix}"
    if not out.name.endswith(suffix):
        raise ConfigError(f"--out is {out}; a file of this format must end in {suffix}")
    return out


@contextmanager
def _said(target: Path) -> Iterator[None]:
    """Inside the block, an error of the disk becomes one line, for any library that writes."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, FileExistsError) and os.path.lexists(target):  # made before, or by another export now
            raise ConfigError(f"{target} already exists; remove it or give another --out") from error
        ours = str(getattr(error, "filename", None) or target).startswith(str(target.parent))
        if not ours or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error)):
            raise
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigError(f"cannot write {target}: {why}; {help_of_disk(error)}, or give another --out") from error


@dataclass
class ExportJob:
    """One export: the loaded weights, and each format as a method that writes to a path.

    plain: parts are written without configs, which only the Wan folder has
    """

    source: str
    part: Part
    ema: bool
    dtype: torch.dtype
    asked_wan: Path | None
    presence: str | None = None
    plain: bool = False

    @cached_property
    def loaded(self) -> LoadedWeights:
        """The whole model; `lora` replaces it by its adapters."""
        return self._load(ema=self.ema)

    @cached_property
    def encoder(self) -> State:
        """The encoder with which a mask decoder was trained, if it is not the Wan folder's."""
        return own_encoder(self.source) if self.part is MASK_DECODER else {}

    def _load(self, *, ema: bool) -> LoadedWeights:
        return load(self.source, self.part, ema=ema, wan=self.asked_wan)

    def safetensors(self, out: Path) -> None:
        metadata = {SETTINGS: to_json(self._settings(self.loaded)).decode()}
        save_file({**self._cast(self.encoder), **self._cast(self.loaded.state_dict)}, out, metadata=metadata)

    def diffusers(self, out: Path) -> None:
        """A DiT is exported with its trained mask decoder, so that prediction needs only the folder and Wan2.1.

        A text-to-video DiT is exported with the whole Wan2.1 folder: it is an initial model, without conventions.
        """
        self._write_part(out)
        if self.part is VIDEO_DIT:
            shutil.copytree(
                self._wan().path, out, ignore=lambda _, names: {VIDEO_DIT.folder} & {*names}, dirs_exist_ok=True
            )
            self._write_card(out, self.part.name)
            return
        beside, encoder = None, self.encoder
        decoder = self.loaded.settings.get(MASK_DECODER.name) or "vae"
        if self.part is not MASK_DECODER and Path(decoder).exists():
            other = replace(self, source=decoder, part=MASK_DECODER)
            other._write_part(out)
            beside, encoder = other.loaded, other.encoder
        held = [self.loaded] if beside is None else [self.loaded, beside]
        own: dict[str, Any] = {OWN_ENCODER: content_sha256(self._as_read(encoder))} if encoder else {}
        self._write_settings(out, self._settings(*held, decoder=beside, **own))

    def _write_part(self, out: Path) -> None:
        state = self._whole(self.loaded)
        if self.plain or self._light(self.loaded):
            (out / self.part.folder).mkdir(parents=True)
            save_file(state, out / self.part.folder / f"{EXPORT_STEM}.safetensors")
            return
        model = self.part.empty(state, self._wan())
        assign_strict(model, state, where=self.source, fix="Give the model.wan of its training (--wan)")
        model.save_pretrained(out / self.part.folder, max_shard_size="5GB")

    def lora(self, out: Path) -> None:
        """Write peft's files, and the identity of their base."""
        adapter = load_adapter(self.source, ema=self.ema)
        trained = adapter.trained
        self.loaded = LoadedWeights(trained, adapter.settings, content_sha256(trained))
        write_adapter(out, self._cast(trained), adapter.config)
        base: dict[str, Any] = {"lora": adapter.config.model_dump(mode="json"), "frozen": dict(adapter.frozen)}

        def merged_sha256(trained: State) -> str:
            return content_sha256(with_base(replace(adapter, trained=trained), wan=self.asked_wan, where=self.source))

        self._write_settings(out, self._settings(self.loaded, dit_sha256=merged_sha256, **base))

    def flowrvs(self, out: Path) -> None:
        if unlike := [f"{name} {self.loaded.settings[name]}" for name in FLOW_PATH if name in self.loaded.settings]:
            said = f"{self.source} has {', '.join(unlike)}"
            raise ConfigError(f"{said}, which FlowRVS's code does not support; use --format diffusers")
        other = self._load(ema=not self.ema) if self.part.pth_holds_both and self._has_both() else self.loaded
        averaged, last = (self.loaded, other) if self.ema else (other, self.loaded)
        self.part.write_pth(out, self._whole(last), self._whole(averaged), self._settings(last, averaged))

    def _cast(self, state: State) -> dict[str, Tensor]:
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in state.items()}

    def _whole(self, loaded: LoadedWeights) -> dict[str, Tensor]:
        state = self._cast(loaded.state_dict)
        if self.encoder or self.plain or self._light(loaded) or self.part.join is None:
            return {**self._cast(self.encoder), **state}
        return self.part.join(state, self._wan())

    def _light(self, loaded: LoadedWeights) -> LightDecoderConfig | None:
        """The size of a light mask decoder, which is not a diffusers model and needs no other weights."""
        return network_of(loaded.state_dict, where=self.source)

    def _has_both(self) -> bool:
        """Whether the source has averaged and last weights: runs do, and .pth files."""
        path = Path(self.source)
        return is_run(path) or (path.is_file() and path.suffix != ".safetensors")

    def _settings(
        self,
        *held: LoadedWeights,
        decoder: LoadedWeights | None = None,
        dit_sha256: Callable[[State], str] = content_sha256,
        **base: Any,
    ) -> dict[str, Any]:
        """The conventions of the weights, the sides of the training's clips, the weights' origin; sealed.

        held: all written weights, which are identified by hash when they are read; decoder: the one written with a
        DiT; dit_sha256: of the whole DiT from the tensors of `self.loaded`
        """
        known = {name: value for name, value in self.loaded.settings.items() if name not in _OWN}
        if (kept := self._kept(decoder, dit_sha256)) is not None:
            known[KEY] = kept.model_dump(mode="json")
        averaged = self.ema and not self.loaded.last_only
        origin = {"sha256": self.loaded.sha256, "ema": averaged, "source": Path(self.source).name}
        holds = [content_sha256(self._as_read(one.state_dict)) for one in held]
        if (size := next(filter(None, map(self._light, held)), None)) is not None:
            known[SETTING] = size.model_dump()
        described = {"objective": self.part.objective, **trained_sides(Path(self.source)), **known, **base}
        return sealed({**described, "weights": origin, HOLDS: sorted(set(holds)), "format": SETTINGS_FORMAT})

    def _kept(self, decoder: LoadedWeights | None, dit_sha256: Callable[[State], str]) -> Presence | None:
        """The threshold, with the hashes of its weights as read later. ConfigError if it belongs to other weights."""
        found = stated(self.presence, presence_in(self.loaded.settings, where=self.source))
        if found is None:
            return None
        if self.part is not DIT:
            raise ConfigError(f"{self.source} is a {self.part.name}; a presence threshold belongs to a DiT")
        weights = {**found.weights, DIT.name: dit_sha256(self.loaded.state_dict)}
        read = {**found.weights, DIT.name: dit_sha256(self._as_read(self.loaded.state_dict))}
        if decoder is not None:
            weights[MASK_DECODER.name] = decoder.sha256
            read[MASK_DECODER.name] = content_sha256(self._as_read(decoder.state_dict))
        found.model_copy(update={"weights": weights}).refuse_other(found, name=self.presence or self.source)
        return found.model_copy(update={"weights": read})

    def _as_read(self, state: State) -> State:
        return {name: tensor.float() for name, tensor in self._cast(state).items()}

    def _write_settings(self, out: Path, settings: dict[str, Any]) -> None:
        (out / EXPORT_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        self._write_card(out, "lora" if "lora" in settings else self.part.name)

    def _write_card(self, out: Path, part: str) -> None:
        plain = self.plain or self._light(self.loaded) is not None
        write_card(out, CardFacts(Path(self.source), out.name, part, self.loaded, self.ema, self.dtype, plain))

    def _wan(self) -> WanFolder:
        known = self.asked_wan or self.loaded.settings.get("wan")
        if known is None:
            raise WeightsError(f"{self.source} does not name its Wan2.1 folder; give --wan")
        if not Path(known).is_dir():
            raise WeightsError(f"{self.source} names {known}, which does not exist; give --wan")
        return WanFolder(Path(known))
