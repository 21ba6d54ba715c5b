"""state.json of a checkpoint: its members and their types. Sealed since format 2.

The type and range of every value that other code relies on are checked here. Values that only the run itself uses
(best evaluation, an objective's own settings) are not checked.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flowmask.data_pipeline.cache.manifest import Count, Fingerprint, Flag, Hash, Some
from flowmask.models.config import FlowStart, LightDecoderConfig, LoraConfig, Predicted
from flowmask.models.errors import CheckpointError, UserError
from flowmask.models.stored.regular import read_regular
from flowmask.models.stored.sealed import parse_object, unseal_since

FORMAT, SEALED_FROM = 2, 2
_MOST_BYTES = 1 << 26
_RANK_FILE = r"^rank_[0-9]{5,9}\.safetensors$"  # no other name in the file is used as a path


class _Saved(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class FrozenWeights(_Saved):
    """Number and hash of the weights that a training does not change."""

    parameters: Count
    sha256: Hash


class Conventions(_Saved):
    """Settings that belong to trained weights; settings of a single objective are stored separately."""

    objective: Annotated[str, Field(max_length=200)] | None = None
    text_tokens: Annotated[int, Field(strict=True, ge=1, le=512)] = 256
    mask_latent_norm: Literal["none", "video"] = "none"
    video_injection: Flag = True
    start: FlowStart = "video"
    predicts: Predicted = "velocity"
    pixel_norm: Literal["half", "imagenet"] = "half"
    lowercase: Flag = True
    short_side: Some | None = None
    long_side: Some | None = None
    wan: str | None = None
    mask_decoder: str | None = None
    light_decoder: LightDecoderConfig | None = None
    lora: LoraConfig | None = None
    frozen: FrozenWeights | None = None


class _SavedModel(_Saved):
    wan: str
    mask_decoder: str
    init: str | None = None
    init_ema: Flag = True


class _SavedTrain(_Saved):
    steps: Count
    schedule_steps: Count | None


class _SavedConfig(_Saved):
    model: _SavedModel
    train: _SavedTrain
    lora: LoraConfig | None = None


class SavedGuard(_Saved):
    """The recent steps by which a guard decides."""

    grad_norms: list[Annotated[float, Field(strict=True)]] = []
    losses: list[Annotated[float, Field(strict=True)]] = []


class SavedRun(_Saved):
    """The part of a checkpoint's state that a training writes."""

    config: _SavedConfig
    fingerprint: Fingerprint
    settings: Conventions
    init: dict[str, Any] | None = None
    frozen: FrozenWeights | None = None
    mlflow_run_id: str | None = None
    skips: dict[str, Count] = {}
    skipped: Count = 0
    skipped_in_a_row: Count = 0
    evaluated_step: Count = 0
    guard: SavedGuard | None = None


class RankFile(BaseModel):
    """Size and hash of one rank's file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Count
    sha256: Hash


class StateFile(BaseModel):
    """The whole file; `state` belongs to the caller."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1, 2]
    step: Count
    updates: Count
    ema_updates: Count
    world_size: Some
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    parameters: dict[str, Annotated[list[Count], Field(max_length=8)]]
    state: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=_RANK_FILE)], RankFile]

    @model_validator(mode="after")
    def _weights_fit_the_files(self) -> Self:
        """Tensors of these shapes must need no more memory than the files have bytes."""
        if 4 * sum(map(prod, self.parameters.values())) > sum(file.bytes for file in self.files.values()):
            raise ValueError("parameters are larger than all files")
        return self


def read_document(path: Path) -> dict[str, Any]:
    """The file's members; CheckpointError if it is missing, damaged or of another format."""
    try:
        content = parse_object(read_regular(path, limit=_MOST_BYTES, inside=path.parent))
        document = unseal_since(content, version="format", first=SEALED_FROM, where=path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if document.get("format") not in (1, FORMAT):
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT}")
    refuse_unlike(StateFile, document, where=path)
    return document


def refuse_unlike(
    kind: type[BaseModel], value: object, *, where: object, error: type[UserError] = CheckpointError
) -> None:
    """Raise `error` with one line that names the first member of `value` that is invalid for `kind`."""
    try:
        kind.model_validate(value)
    except ValidationError as found:
        first = found.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise error(f"{where} is damaged, or of another version ({name[:100]}: {first['msg'][:200]})") from None
