"""The cost of node failures to a run, and how often it should save: pure functions of seconds.

The measure is the effective training time ratio of Kokolis et al. (arXiv 2410.21680): the share of wall time spent in
steps that are kept. Failures are memoryless; a run continues from its newest complete checkpoint.
"""

import math
from dataclasses import dataclass

NODE_MTBF_H = 3692.0  # 6.5 failures in 1,000 days of a node: RSC-1 in that paper
RESTART_MIN = 10.0
HOST_COPY_GB_S = 10.0  # per GPU; an assumption
DISK_GB_S = 5.0  # of the shared filesystem; an assumption
_CANDIDATES = 400  # intervals that are compared


@dataclass(frozen=True)
class Cluster:
    """The user's assumptions about the machines.

    node_mtbf_h: mean hours between two failures of one node
    restart_min: minutes from a failure to the first step after it, with the time in the queue
    """

    node_mtbf_h: float = NODE_MTBF_H
    restart_min: float = RESTART_MIN


STATED = Cluster()


@dataclass(frozen=True)
class Saving:
    """The costs around a save, in seconds.

    mtbf_s:    mean time between two failures of the whole job
    restart_s: from a failure to the first step after it
    stall_s:   time for which a save blocks the steps
    write_s:   from the start of a save until it is complete; the next save waits for it
    """

    mtbf_s: float
    restart_s: float
    stall_s: float
    write_s: float

    @classmethod
    def of(cls, cluster: Cluster, *, checkpoint_bytes: float, nodes: int, ranks: int) -> "Saving":
        return cls(
            mtbf_s=cluster.node_mtbf_h * 3600 / nodes,
            restart_s=cluster.restart_min * 60,
            stall_s=checkpoint_bytes / ranks / (HOST_COPY_GB_S * 1e9),
            write_s=checkpoint_bytes / (DISK_GB_S * 1e9),
        )

    def effective(self, every_s: float) -> float:
        """The share of wall time spent in kept steps, with `every_s` seconds of steps between two saves.

        A run that starts from a checkpoint keeps k intervals if it survives k of them and one write. A failure during a
        restart starts the restart again.
        """
        interval = max(every_s + self.stall_s, self.write_s)
        lives = -math.expm1(-interval / self.mtbf_s)
        kept = math.exp(-(interval + self.write_s) / self.mtbf_s) / lives
        return every_s * kept / self.mtbf_s * math.exp(-self.restart_s / self.mtbf_s)

    def best_interval_s(self) -> float:
        """The seconds of steps between two saves for which `effective` is largest."""
        shortest, longest = max(self.write_s, self.stall_s, 1.0), 10 * self.mtbf_s + self.write_s
        ratio = (longest / shortest) ** (1 / _CANDIDATES)
        return max((shortest * ratio**n for n in range(_CANDIDATES + 1)), key=self.effective)


@dataclass(frozen=True)
class SavePlan:
    """The save interval of a config, compared with the best one.

    every_s:    seconds between two saves of the config
    effective:  the share of wall time spent in kept steps
    best_steps: the interval with the largest share, rounded to two digits
    """

    every_s: float
    effective: float
    best_steps: int
    best_effective: float
    costs: Saving


def plan_saves(costs: Saving, *, every_steps: int, step_s: float) -> SavePlan:
    """step_s: seconds of one optimizer step."""
    best = max(1, round(float(f"{costs.best_interval_s() / step_s:.2g}")))
    every_s = every_steps * step_s
    return SavePlan(every_s, costs.effective(every_s), best, costs.effective(best * step_s), costs)
