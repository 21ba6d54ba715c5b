"""What a person types, and how jobs reach machines; imported by nothing else.

The files here are the ground of the folders (config, finding, console, progress), but for `dispatch`, which chooses
where a job runs and stands behind jobs, local, slurm, plan and check. A new command is a function in `cli`.
Imports every room.
"""
