"""`flowmask status`, `logs`, `stop` and `profile`: how runs are getting on, told from files and the queue alone.

Imports jobs, slurm and the curriculum's list of stages. What a kind of job leaves in its folder, the job reads.
How a kind of run is getting on is `Job.status`; a new view is a function in `control`.
"""
