"""The checks before anything runs: `preflight` checks a job, `doctor` the machine; both return `Finding`s.

Imports jobs, slurm and plan. A requirement of only one kind of job is stated by that job, not here.
A check of a job is a function in `preflight`, a check of the machine is one in `questions`.
"""
