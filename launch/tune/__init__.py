"""`flowmask tune`: which settings of a job are the fastest here, by timing them; none of them changes what it makes.

`axes.py`: what is tried. `search.py`: the search and its time limit. `trials.py` and `worker.py`: how one is timed.
A further setting is an axis in `axes.py`; a training's must be one that `trainer/state/resume.py` lets a run choose.
"""
