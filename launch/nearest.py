"""Finds the key meant by an unknown key: by name, by another trainer's name, by spelling."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

# name in other trainers -> name here: the last part of a key or a whole key.
MEANS = {
    **dict.fromkeys(("learning_rate", "lr_init", "base_lr", "max_lr"), "lr"),
    **dict.fromkeys(("batch_size", "train_batch_size", "total_batch_size"), "global_batch"),
    **dict.fromkeys(("per_device_batch_size", "per_device_train_batch_size", "batch_per_gpu"), "micro_batch"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accumulation"), "global_batch"),
    **dict.fromkeys(("epoch", "num_epochs", "num_train_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "max_train_steps", "num_steps", "iterations", "total_steps"), "steps"),
    **dict.fromkeys(("warmup", "lr_warmup_steps", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("lr_schedule", "lr_scheduler", "scheduler", "lr_scheduler_type"), "schedule"),
    **dict.fromkeys(
        ("gradient_checkpointing", "recompute", "recomputation", "checkpointing"), "activation_checkpointing"
    ),
    **dict.fromkeys(("mixed_precision", "amp", "bf16", "fp16"), "precision"),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad", "clip_norm"), "grad_clip"),
    **dict.fromkeys(("wd",), "weight_decay"),
    **dict.fromkeys(("optim",), "optimizer"),
    **dict.fromkeys(("deepspeed_stage", "zero", "stage"), "zero_stage"),
    **dict.fromkeys(("num_workers", "workers", "dataloader_num_workers"), "threads"),
    **dict.fromkeys(("num_frames", "clip_length", "sequence_length"), "frames"),
    **dict.fromkeys(("resolution", "size", "image_size"), "short_side"),
    **dict.fromkeys(("output_dir", "output", "save_dir", "logdir", "work_dir"), "out"),
    **dict.fromkeys(("pretrained", "pretrained_model_name_or_path", "model_path", "ckpt_dir"), "model.wan"),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "ckpt", "weights"), "checkpoint"),
    **dict.fromkeys(("save_steps", "save_every", "checkpointing_steps"), "checkpoint.every_steps"),
    **dict.fromkeys(("save_total_limit", "keep"), "keep_last"),
    **dict.fromkeys(("ema_decay",), "ema.decay"),
    **dict.fromkeys(("lora_rank", "r"), "lora.rank"),
    **dict.fromkeys(("logging_steps", "log_every", "log_interval"), "log_every_steps"),
    **dict.fromkeys(("num_inference_steps", "sampling_steps", "num_sampling_steps"), "sampler.steps"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "nproc_per_node", "num_processes"), "processes_per_node"),
    **dict.fromkeys(("num_nodes", "nnodes"), "nodes"),
    **dict.fromkeys(("time", "timeout_min", "walltime"), "time_min"),
    **dict.fromkeys(("mem", "memory"), "mem_gb"),
    **dict.fromkeys(("dataset", "dataset_name"), "source"),
    **dict.fromkeys(("data_dir", "dataset_dir", "data_root", "root_dir"), "root"),
    **dict.fromkeys(("mlflow_uri", "tracking_uri"), "tracking.uri"),
}


def nearest(kind: type[BaseModel], location: Sequence[str]) -> str:
    """The end of a message about an unknown key: the nearest key, or the keys of its section.

    Searched in this order: the same name anywhere, another trainer's name for it, a similar name in the same
    section, a similar key anywhere.
    """
    section, name = ".".join(location[:-1]), location[-1]
    keys = dict(_keys(kind))
    own = [key for key in keys if _section_of(key) == section]
    leaves = [key for key, leaf in keys.items() if leaf]
    if found := _called(name, leaves) or _called(MEANS.get(name.lower(), ""), leaves, near=section):
        return f"; did you mean {found}?"
    similar = difflib.get_close_matches(name, [_name_of(key) for key in own], n=1, cutoff=0.6)
    if similar:
        return f"; did you mean {'.'.join(filter(None, (section, similar[0])))}?"
    if close := difflib.get_close_matches(".".join(location), leaves, n=1, cutoff=0.8):
        return f"; did you mean {close[0]}?"
    names = ", ".join(sorted(_name_of(key) for key in own))
    return f"; {section or 'the config'} knows {names}" if own else ""


def _called(wanted: str, leaves: Sequence[str], *, near: str = "") -> str | None:
    """The key with that last part or that full name; if several match, the one in the section `near`."""
    found = [key for key in leaves if wanted and (key == wanted or key.endswith(f".{wanted}"))]
    return min(found, key=lambda key: (_section_of(key) != near, key.count(".")), default=None)


def _section_of(key: str) -> str:
    return key.rpartition(".")[0]


def _name_of(key: str) -> str:
    return key.rpartition(".")[2]


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every dotted key, and whether it is a value (True) or a section."""
    for name, field in kind.model_fields.items():
        section = _section(field.annotation)
        yield prefix + name, section is None
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also inside Optional."""
    candidates = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    if get_origin(annotation) not in (None, Union) and not any(isinstance(c, type) for c in candidates):
        return None
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
