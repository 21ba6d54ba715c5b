"""An evaluation's masks as the zip file that a benchmark's server accepts.

    mevis            <video>/<expression>/<frame>.png
    ref_youtube_vos  Annotations/<video>/<expression>/<frame>.png

Equal masks give equal bytes: sorted entries, a fixed date, stored without compression (PNGs are compressed).
"""

import zipfile
from pathlib import Path
from typing import Literal

from flowmask.models.files import whole_file

Layout = Literal["mevis", "ref_youtube_vos"]
FILE = "submission.zip"
_ABOVE = {"mevis": "", "ref_youtube_vos": "Annotations/"}
_DATE = (1980, 1, 1, 0, 0, 0)


def write_archive(out: Path, *, masks: Path, layout: Layout) -> Path:
    """Write out/submission.zip of every mask below `masks`, atomically; returns its path."""
    path = out / FILE
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for mask in sorted(masks.rglob("*.png")):
            name = f"{_ABOVE[layout]}{mask.relative_to(masks).as_posix()}"
            archive.writestr(zipfile.ZipInfo(name, _DATE), mask.read_bytes())
    return path
