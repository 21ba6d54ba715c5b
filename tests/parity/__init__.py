"""The reference's recorded numbers as checks, one per tensor or record; `tests/test_parity.py` runs them.

Everything is derived from the files of a set, so that a set of other sizes, seeds and names runs through the
same checks. A case that cannot be read is a failing check, never a missing one.
"""
