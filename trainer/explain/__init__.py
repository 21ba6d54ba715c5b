"""A run that explains itself: each rank's time line, the slowest rank and why, hangs, profiles, and the page of it all.

Imports `state` and `track`; every rank writes below RUN/timeline, RUN/hang and RUN/profile, and nothing that goes wrong
there ends a training. A new phase is a name in trainer/phases.py, a new cause an entry in `verdict.CAUSES`.
"""
