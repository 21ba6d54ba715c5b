"""The model card of an exported folder: README.md in the form of Hugging Face's hub, made from stored facts.

States base model, data, step, version of the code, licences, how to load, and the scores of evaluations of exactly
these weights, which are searched inside the run's folder and next to it. Unrecorded facts are left out. Names are
shown as text; paths are not shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from flowmask.models.files import read_object
from flowmask.models.safe.secrets import masked_uri
from flowmask.models.safe.words import printable
from flowmask.models.stored.typed import read_yaml
from flowmask.trainer.predict.weights import LoadedWeights
from flowmask.trainer.state.checkpoint import read_run
from flowmask.trainer.state.provenance import git_commit
from flowmask.trainer.state.steps import newest

CARD = "README.md"
_PUBLISHED = {  # by the DiT's number of blocks and its width
    (30, 1536): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (40, 5120): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
_VAE_WIDTH, _VAE_OF = 384, (30, 1536)  # the widest layer of the VAE, which is the same in both
_SEGMENTS = "of a model of referring video segmentation: a video and a sentence go in, and the mask of the object that"
_FIRST = {
    "dit": f"The diffusion transformer (DiT) {_SEGMENTS} the sentence names comes out.",
    "mask_decoder": f"The mask decoder {_SEGMENTS} the sentence names comes out.",
    "video_dit": "A Wan folder whose diffusion transformer was trained further on text to video.",
    "lora": f"LoRA adapters for the diffusion transformer (DiT) {_SEGMENTS} the sentence names comes out.",
}
_DIT = """from diffusers import WanTransformer3DModel

dit = WanTransformer3DModel.from_pretrained({folder!r}, subfolder="transformer")"""
_LOADING = {
    "dit": _DIT,
    "video_dit": _DIT,
    "mask_decoder": """from diffusers import AutoencoderKLWan

vae = AutoencoderKLWan.from_pretrained({folder!r}, subfolder="mask_decoder")""",
    "lora": """from flowmask.models.weights.wan import WanFolder

dit = WanFolder(WAN).transformer(video_injection={injected})  # WAN: the path of the Wan2.1 folder
dit.load_lora_adapter({folder!r}, prefix="base_model.model", weight_name="adapter_model.safetensors")""",
}
_LICENCE = """\
{base}FlowMask is under Apache-2.0. The datasets of the training have their own terms; some exclude commercial use.
Whoever publishes these weights states here which hold."""
_OF_WAN = "Wan2.1, from which these weights were trained, is under Apache-2.0. "


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card.

    source: the run, step, export or file that was exported; folder: the name of the export
    part:   its name in `predict/parts.py`, or "lora" for adapters alone
    ema:    the averaged weights were requested; plain: the folder has no configs that diffusers reads
    """

    source: Path
    folder: str
    part: str
    loaded: LoadedWeights
    ema: bool
    dtype: torch.dtype
    plain: bool


def write_card(out: Path, facts: CardFacts) -> None:
    """Write the card into `out`, replacing the base's card."""
    (out / CARD).unlink(missing_ok=True)
    (out / CARD).write_text(model_card(facts), encoding="utf-8")


def model_card(facts: CardFacts) -> str:
    """The full text: a YAML head, a description, training, scores, how to load, licence."""
    base = published_base({name: tensor.shape for name, tensor in facts.loaded.state_dict.items()})
    head: dict[str, Any] = {
        "license": "other",
        "license_name": "apache-2.0-and-terms-of-the-datasets",
        **({"base_model": base} if base else {}),
        "library_name": "peft" if facts.part == "lora" else "diffusers",
        "tags": ["flowmask", "referring-video-segmentation"],
    }
    sections = {
        "Training": _table(["", ""], [*_training(facts, base).items()]),
        "Scores": _table(["evaluation", "J&F", "J", "F", "videos", "expressions"], [*_scores(facts)]),
        "How to load": _how_to_load(facts),
        "Licence": _LICENCE.format(base=_OF_WAN if base else ""),
    }
    trained = "Trained from Wan2.1 with FlowMask." if base else "Trained with FlowMask."
    text = [f"# {_shown(facts.folder)}", f"{_FIRST[facts.part]} {trained}"]
    text += [f"## {title}\n\n{section}" for title, section in sections.items() if section]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(text) + "\n"


def published_base(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The published model that weights of these shapes were trained from; None for other sizes."""
    if (first := shapes.get("decoder.conv_in.weight")) is not None:
        return _PUBLISHED[_VAE_OF] if first[0] == _VAE_WIDTH else None
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    widths = [shape[0] for name, shape in shapes.items() if name == "patch_embedding.weight"]
    widths += [shape[1] for name, shape in shapes.items() if name.endswith(".attn1.to_q.lora_A.weight")]
    return _PUBLISHED.get((len(blocks), widths[0])) if widths else None


def _training(facts: CardFacts, base: str | None) -> dict[str, str]:
    """Names and values of the known facts of the training."""
    settings, known = facts.loaded.settings, {}
    if base or settings.get("wan"):
        known["Base model"] = base or f"folder `{_shown(Path(settings['wan']).name)}`"
    if (checkpoint := newest(facts.source)) is not None:
        document = read_run(checkpoint)
        state = document["state"]
        known |= {
            "Dataset": ", ".join(f"cache `{name}`" for name in _caches(state["config"].get("data"))),
            "Fingerprint of the data": f"`{_shown(state['fingerprint']['total'][:12])}`",
            "Steps": f"{document['step']:,} of {state['config']['train']['steps']:,}",
        }
    return {
        **known,
        **({"Objective": f"`{_shown(settings['objective'])}`"} if settings.get("objective") else {}),
        "Weights": f"{'averaged (EMA)' if facts.ema and not facts.loaded.last_only else 'of the last step'}, "
        + str(facts.dtype).removeprefix("torch."),
        "SHA-256 of the values": f"`{facts.loaded.sha256}`",
        "Exported from": f"`{_shown(facts.source.name)}`",
        "Exported by": f"FlowMask {version('flowmask')}, commit `{git_commit()}`",
    }


def _caches(data: Any) -> list[str]:
    """The names of the caches that a saved config reads."""
    data = data if isinstance(data, Mapping) else {}
    mix = [entry.get("cache") for entry in data.get("mix") or () if isinstance(entry, Mapping)]
    return [_shown(Path(masked_uri(str(cache))).name) for cache in mix or [data.get("cache")]]


def _scores(facts: CardFacts) -> Iterator[list[str]]:
    """A row for each evaluation of exactly these weights."""
    if newest(facts.source) is None:
        return
    run = facts.source.resolve()
    for file in sorted({*run.glob("*/scores.json"), *run.parent.glob("*/scores.json")}):
        found = read_object(file)
        weights = found.get("weights")
        if isinstance(weights, Mapping) and weights.get(facts.part) == facts.loaded.sha256:
            numbers = [found.get(key) for key in ("jf", "j", "f")]
            shown = [f"{number:.1f}" if isinstance(number, int | float) else "" for number in numbers]
            yield [_dataset(file.parent), *shown, *(_shown(found.get(key, "")) for key in ("videos", "expressions"))]


def _dataset(evaluation: Path) -> str:
    """Dataset and split of an evaluation; the name of its folder if its config doesn't state them."""
    try:
        data = read_yaml(evaluation / "config.yaml")["data"]
        return f"{_shown(data['source'])}, {_shown(data['split'])}"
    except (OSError, ValueError, TypeError, KeyError):
        return _shown(evaluation.name)


def _how_to_load(facts: CardFacts) -> str:
    """How FlowMask and diffusers load the folder."""
    as_wan = facts.part == "video_dit"
    ours = f"In FlowMask: `{'model.wan=' if as_wan else '--checkpoint '}{_shown(facts.folder)}`."
    if facts.plain:
        return f"{ours} The folder has no config that diffusers could read."
    injected = bool(facts.loaded.settings.get("video_injection", True))
    return f"{ours}\n\n```python\n{_LOADING[facts.part].format(folder=facts.folder, injected=injected)}\n```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _shown(text: object) -> str:
    """A name as text, escaped for a cell, a line, a code span and HTML."""
    return printable(text)[:200].translate(str.maketrans("`|<>", "'/()"))
