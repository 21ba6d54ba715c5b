"""The ranks of a job on this machine: starts, signals and always ends them.

Imports no job's code; a rank imports the code of its job.
A new way for a rank to end is a case in `worker.main` and in `processes._verdict`.
"""
