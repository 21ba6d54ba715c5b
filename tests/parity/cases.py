"""Every case of a parity set by name, and the files in its manifest."""

import functools
from collections.abc import Iterator

from parity.core import Case, Check, ParitySet
from parity.decoder_case import decoder_checks
from parity.dit_case import dit_checks, init_checks
from parity.e2e_case import e2e_checks
from parity.flow_loss_case import flow_loss_checks
from parity.frames_case import frames_checks
from parity.metrics_case import metrics_checks
from parity.pixels_case import pixels_checks
from parity.sampler_case import sampler_checks
from parity.text_case import text_checks
from parity.timesteps_case import timesteps_checks


def _exists(data: ParitySet, file: str) -> None:
    assert (data.root / file).is_file(), f"{file} is listed in the manifest but missing"


def manifest_checks(data: ParitySet) -> Iterator[Check]:
    listed = data.record("manifest.json")
    assert listed, "the manifest lists nothing"
    for file in listed:
        yield Check(file, functools.partial(_exists, data, file))


CASES: dict[str, Case] = {
    "manifest": manifest_checks,
    "dit_plain": functools.partial(dit_checks, case="dit_plain"),
    "dit_dvi": functools.partial(dit_checks, case="dit_dvi"),
    "dit_dvi_init": functools.partial(init_checks, case="dit_dvi"),
    "flow_loss": flow_loss_checks,
    "timesteps": timesteps_checks,
    "sampler": sampler_checks,
    "mask_decoder": decoder_checks,
    "text": text_checks,
    "metrics": metrics_checks,
    "resize": pixels_checks,
    "frame_sampling": frames_checks,
    "e2e": e2e_checks,
}
