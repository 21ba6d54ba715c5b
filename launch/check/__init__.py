"""What is asked before anything runs: `preflight` about a job, `doctor` about the machine; both tell `Finding`s.

Imports jobs, slurm and plan. What only one kind of job must have is said by that job, not asked here.
A check of a job is a function in `preflight`, a question about the machine one in `questions`.
"""
