"""Whether the machine that runs a job can compute the attention that it asks for."""

from collections.abc import Iterator

from flowmask.launch.check.ask import ask
from flowmask.launch.finding import Finding
from flowmask.launch.jobs.job import Job

# In another process: the one that asks would hold memory of a GPU, or a GPU that only one process may use.
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
    """Nothing of a job that leaves the choice to torch. here: the job runs on this machine."""
    key, name = job.attention_key
    if name == "native":
        return
    if not here:
        said = f"{key} is {name}: whether the compute nodes can, the job says before its first step"
        yield Finding("attention", "unknown", said, "ask there: srun flowmask doctor CONFIG launch.cluster=local")
        return
    refused, problem = ask(_TRY.format(name=name, key=key, device=job.computes_on))
    if refused or problem:
        yield Finding("attention", "fail", refused or f"{key} is {name}: {problem}", f"set {key}=native")
        return
    yield Finding("attention", "pass", f"{key}: {name} can be had here")
