"""The contract of an objective: everything that submission, plan, training, evaluation and export need from it.

An objective knows no rank, engine or optimiser. Every draw is a function of the example's key alone. Small draws
are made in the loader's threads; the posterior's noise is drawn on the device (drawing it on a CPU takes five times as
long as reading the latents, and doubles the bytes sent to a GPU). A loss is the mean over the micro-batch, in
float32. Metrics are sums and counts (`x_sum`, `x_count`), which may be added or averaged over micro-batches
and ranks: `read_metrics` divides. Importing this file does not import torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import Field

from flowmask.models.config import ModelConfig, Recompute, Section
from flowmask.models.errors import CacheError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowmask.data_pipeline.cache.manifest import Manifest
    from flowmask.data_pipeline.read.loader import Batch
    from flowmask.models.vae import LatentStats

Makes = Literal["dit", "mask_decoder", "video_dit"]
Grid = tuple[int, int, int]  # f, h, w of a latent
_CHANNELS = 16


class ObjectiveConfig(Section):
    """The keys of every objective's section; each objective adds more."""

    kind: str = Field(description="what is learned: a file in trainer/objectives, or an installed one")

    def refuse_beside(self, model: ModelConfig, *, lora: bool) -> None:
        """Raises ValueError, like a validator, if this section contradicts `model` or LoRA (`lora`)."""


class Shapes(Protocol):
    """Modules of a Wan folder, on the meta device."""

    def dit(self, *, video_injection: bool, layers: int | None = None) -> "nn.Module":
        """The DiT, with all its blocks or only `layers` of them."""

    def vae(self) -> Any:
        """The VAE."""


class Objective(ABC):
    """One objective: a loss as a function of (module, batch), and facts about it.

    needs:      names of the tensors of a batch that it needs
    makes:      the part that its weights form; decides their export, loading and use
    wan_parts:  folders of Wan2.1 that training reads; the first is that of the trained module
    has_blocks: the module consists of transformer blocks, so it can recompute, be compiled, split its tokens over
                ranks and take LoRA adapters; one without blocks can recompute if it overrides `recompute`
    noiseless:  keys of the section for validation: with them only the timestep is random
    """

    Config: ClassVar[type[ObjectiveConfig]]
    needs: ClassVar[frozenset[str]]
    makes: ClassVar[Makes]
    wan_parts: ClassVar[tuple[str, ...]]
    has_blocks: ClassVar[bool] = False
    noiseless: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Any, model: ModelConfig, stats: "LatentStats") -> None:
        self._config, self._model, self._stats = config, model, stats

    @abstractmethod
    def build(self) -> "nn.Module":
        """The module to train, float32 on the CPU, with the weights of `model.wan`."""

    @abstractmethod
    def blueprint(self, shapes: Shapes, *, layers: int | None = None) -> "nn.Module":
        """The same module on the meta device, for plans; layers: number of its blocks, None for all."""

    def recompute(self, module: "nn.Module", kind: Recompute) -> None:
        """Make the module drop activations and compute them again, selective or full; the loss does not change."""
        from flowmask.models.dit import recompute_blocks

        recompute_blocks(module, kind)

    @classmethod
    def recomputes(cls) -> bool:
        """Whether `recompute` is supported."""
        return cls.has_blocks or cls.recompute is not Objective.recompute

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The conventions that the weights depend on, and "objective"; saved in every checkpoint and export."""

    def check_cache(self, manifest: "Manifest", *, where: object) -> None:
        """CacheError for another VAE, or for unannotated frames (only a loss on pixels can leave these out)."""
        from flowmask.models.weights.wan import WanFolder

        known = WanFolder(self._model.wan).latent_stats() if "video_mean" in self.needs else None
        if known is not None and not known.close_to(self._stats):
            raise CacheError(
                f"{where}: latents_mean and latents_std are not those of the VAE in model.wan {self._model.wan}: the "
                "cache was made with another VAE; build it again, or set model.wan to the folder of that VAE"
            )
        if manifest.partly_annotated and "mask_pixels" not in self.needs:
            raise CacheError(
                f"{where} holds {manifest.partly_annotated} examples with unannotated frames, but "
                f"objective.kind={self._config.kind} learns from whole latents: build the cache with "
                "clip.sampling=sparse, which makes a clip of each annotated frame"
            )

    @abstractmethod
    def prepare(self, batch: "Batch") -> "Batch":
        """Fill `batch.draws`; called in the loader's threads."""

    @abstractmethod
    def loss(self, module: "nn.Module", batch: "Batch") -> "tuple[Tensor, dict[str, Tensor]]":
        """Mean loss of a micro-batch (float32 scalar), and metrics as sums and counts (scalars, detached)."""

    def quiet(self) -> Self:
        """The same objective, with only the timestep random."""
        return type(self)(self._config.model_copy(update=self.noiseless), self._model, self._stats)

    def tokens(self, shape: Mapping[str, Any], latent: Grid) -> int:
        """Tokens of one example, 0 if it has none; shape: the module's constructor arguments."""
        return 0

    def training_flop(self, shape: Mapping[str, Any], latent: Grid, *, adapters: bool = False) -> float | None:
        """FLOPs of one example, forward and backward; None without a formula: a plan then runs a dry pass."""
        return None

    def fake_draws(self, batch: "Batch") -> "dict[str, Tensor]":
        """For plans: tensors [B ...] by name, of the shapes that `prepare` and `loss` draw."""
        return {}

    def fake_batch(self, latent: Grid, *, examples: int, text_dim: int) -> "Batch":
        """For plans: an empty micro-batch with all needed tensors, text at full length."""
        import torch

        from flowmask.data_pipeline.read.loader import Batch

        f, h, w = latent
        moments = ((examples, _CHANNELS, f, h, w), torch.bfloat16)
        tensors = {
            "video_mean": moments,
            "video_logvar": moments,
            "mask_mean": moments,
            "mask_pixels": ((examples, 4 * f - 3, 8 * h, 8 * w), torch.bool),
            "text": ((examples, self._model.text_tokens, text_dim), torch.bfloat16),
        }
        needed: dict[str, Any] = {name: torch.zeros(*tensors[name][:1], dtype=tensors[name][1]) for name in self.needs}
        count = torch.arange(examples)
        batch = Batch(
            step=0, example_ids=count, positions=count, epochs=0 * count, keys=[0] * examples, digest=0, **needed
        )
        batch.text_tokens = self._model.text_tokens
        batch.draws = self.fake_draws(batch)
        return batch


def read_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the global batch from sums and counts; a metric with a count of 0 is left out."""
    means = {}
    for name, total in sums.items():
        if name.endswith("_sum") and sums[f"{name[:-4]}_count"]:
            means[name[:-4]] = total / sums[f"{name[:-4]}_count"]
    return means
