"""What a build will do, before it does it: units of work, their cost, the fingerprint, the check for leaks.

Imports `clip`, `cache` and `sources`; encodes nothing.
What determines bytes is a field in `fingerprint`.
"""
