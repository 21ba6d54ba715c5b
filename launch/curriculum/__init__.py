"""`flowmask curriculum`: stages as a DAG of jobs. The content of a stage's folder decides whether it is done.

Imports the jobs, `check`, `slurm` and `dispatch`. `checks` holds the rules between stages.
A new rule between stages is a function in `checks`.
"""
