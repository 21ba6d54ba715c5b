"""`flowmask curriculum`: stages as a DAG of jobs; what is done is told by content.

Imports the jobs, `check`, `slurm` and `dispatch`. What must hold between stages is asked in `checks`.
A new rule between stages is a function in `checks`.
"""
