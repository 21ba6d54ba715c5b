"""The commands of the command line, and the code that starts jobs on machines. No other code imports it.

The files here are shared by the folders (config, finding, console, progress), except `dispatch`: it chooses where a job
runs, and imports jobs, local, slurm, plan and check. A new command is a function in `cli`. Imports every room.
"""
