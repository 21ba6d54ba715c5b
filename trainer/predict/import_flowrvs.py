"""Converts published weights to an export: one folder that also records the settings that the files lack."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from flowmask.models.config import AskedConventions
from flowmask.models.errors import WeightsError
from flowmask.trainer.predict.conventions import settle
from flowmask.trainer.predict.export import Exported, ExportJob, write_new
from flowmask.trainer.predict.parts import DIT, MASK_DECODER


def import_flowrvs(
    dit: Path,
    *,
    decoder: Path | None,
    out: Path,
    conventions: AskedConventions,
    ema: bool = True,
    wan: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a new folder `out` with the DiT, the mask decoder with its encoder, and the settings; fp32, to the bit.

    dit, decoder: FlowRVS .pth files, or state dicts; no decoder: the VAE's own
    conventions:  of the training; missing ones are assumed and reported
    wan:          Wan2.1 folder, to add the configs that diffusers needs; FlowMask does not need them
    Raises UserError if something is missing, damaged, of another project or already exists.
    """
    for path in (dit, *([decoder] if decoder else [])):
        if not path.exists():
            raise WeightsError(f"{path} does not exist; give a FlowRVS .pth file")
    job = ExportJob(str(dit), part=DIT, ema=ema, dtype=torch.float32, asked_wan=wan, plain=wan is None)
    settled = settle(job.loaded.settings, conventions, where=dit)
    if job.loaded.last_only:
        say(f"{dit}: it has no averaged weights, so the last ones are used (--no-ema)")
    if settled.assumed:
        say(f"{dit}: {settled.said()}")
    beside = {MASK_DECODER.name: str(decoder)} if decoder else {}
    job.loaded = replace(job.loaded, settings={**settled.settings, **beside})
    return write_new(out, job, job.diffusers)
