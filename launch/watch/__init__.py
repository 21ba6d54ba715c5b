"""`flowmask status`, `logs`, `stop` and `profile`: the state of runs, read only from files and the queue.

Imports jobs, slurm and the curriculum's list of stages. Each kind of job reads its own folder.
The state of a kind of run is `Job.status`; a new view is a function in `control`.
"""
