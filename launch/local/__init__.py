"""The ranks of a job on this machine: started, signalled, never left behind.

Imports the jobs by name alone; a rank's own code imports what its job needs.
A new way for a rank to end is a case in `worker.main` and in `processes._verdict`.
"""
