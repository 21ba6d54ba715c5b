"""The commands that a person types, and the code that starts jobs on machines. Nothing else imports it.

The files here are shared by the folders (config, finding, console, progress), except `dispatch`: it chooses where a job
runs, and imports jobs, local, slurm, plan and check. A new command is a function in `cli`.
Imports every room.
"""
