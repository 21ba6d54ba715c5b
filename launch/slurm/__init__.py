"""A job on SLURM: submitted through submitit (`executor`), one task a node, requeued until it is done.

Imports `local`; SLURM's own commands are called in `commands` alone.
"""
