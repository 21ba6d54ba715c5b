"""What a run is on disk: checkpoints, the run folder, who works in it, which code runs.

Imports `step`; whatever a resume needs is written and read here.
"""
