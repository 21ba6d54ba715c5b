"""A job on SLURM: submitted through submitit (`executor`), one task per node, requeued until it is done.

Imports `local`, `jobs` and the launcher's shared files; only `commands` calls SLURM's own commands. A new cause of
an end is a case in `requeue.why_ended` and a row in its budgets.
"""
