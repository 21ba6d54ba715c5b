"""The reference's recorded numbers as checks, one per tensor or record; `tests/test_parity.py` runs them.

All sizes, seeds and names come from the files of a set, so the same checks run on another set. A case that cannot be
read is a failing check, never a missing one.
"""
