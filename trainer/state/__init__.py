"""A run on disk: checkpoints, the run folder, the process working in it, the version of the code.

Imports `step` and the cache's readers. All state for a resume is written and read here. The config field of a key says
whether a resume may change it (`MayChange`).
"""
