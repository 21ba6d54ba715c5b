"""Checks that the machine that runs a job supports the attention kernel in its config."""

from collections.abc import Iterator

from flowmask.launch.check.ask import ask
from flowmask.launch.finding import Finding
from flowmask.launch.jobs.job import Job

# Run in another process: this one would otherwise hold GPU memory, or a GPU in exclusive mode.
_TRY = """
import json
from flowmask.models.device import rank_device
from flowmask.models.dit import require_attention
from flowmask.models.errors import UserError
try:
    require_attention({name!r}, key={key!r}, device=rank_device({device!r}))
    print(json.dumps(""))
except UserError as error:
    print(json.dumps(str(error)))
"""


def attention(job: Job, *, here: bool) -> Iterator[Finding]:
    """No finding if torch chooses the kernel. here: the job runs on this machine."""
    key, name = job.attention_key
    if name == "native":
        return
    if not here:
        said = f"{key} is {name}: the job checks before its first step whether the compute nodes support it"
        yield Finding("attention", "unknown", said, "check there: srun flowmask doctor CONFIG launch.cluster=local")
        return
    refused, problem = ask(_TRY.format(name=name, key=key, device=job.computes_on))
    if refused or problem:
        yield Finding("attention", "fail", refused or f"{key} is {name}: {problem}", f"set {key}=native")
        return
    yield Finding("attention", "pass", f"{key}: {name} is supported here")
