"""`flowmask plan`: estimates memory, time and disk space of a job, without a GPU, weights or data.

A job of a new kind is a file here and a branch in `plan`; work is counted on the meta device (`models.cost`).
Imports `jobs` and the folders below.
"""
