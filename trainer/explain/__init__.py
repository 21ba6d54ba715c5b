"""Explains a run: each rank's timeline, the slowest rank and the cause, hangs, profiles, and a page of all this.

Imports `state` and `track`; every rank writes below RUN/timeline, RUN/hang and RUN/profile. An error there never
ends a training. A new phase is a name in trainer/phases.py, a new cause an entry in `verdict.CAUSES`.
"""
