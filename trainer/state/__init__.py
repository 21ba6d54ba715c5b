"""What a run is on disk: checkpoints, the run folder, the process that works in it, the code that runs.

Imports `step` and the cache's readers. Whatever a resume needs is written and read here; whether a key may change on
a resume stands at its field (`MayChange`).
"""
