"""`flowmask tune`: finds the fastest settings of a job on this machine by timing them. No setting changes the results.

`axes.py`: what is tried. `search.py`: the search and its time limit. `trials.py` and `worker.py`: how one is timed.
A new setting is an axis in `axes.py`. For a training, `trainer/state/resume.py` must allow a run to change it.
"""
