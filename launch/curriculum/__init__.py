"""`flowmask curriculum`: stages as a DAG of jobs; what is done is told by content.

Imports the jobs and `slurm`.
"""
