"""`flowmask tune`: finds the fastest settings of a job on this machine by timing them. No setting changes the results.

`axes.py`: the settings to try. `search.py`: the search and its time limit. `trials.py` and `worker.py`: the timing.
A new setting is an axis in `axes.py`. For a training, `trainer/state/resume.py` must allow a run to change it.
"""
