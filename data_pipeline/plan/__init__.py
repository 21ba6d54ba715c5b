"""Plans a build in advance: units of work, their cost, the fingerprint, the check for leaks.

Imports `clip`, `cache` and `sources`; encodes nothing.
A new value that determines bytes is a field in `fingerprint`.
"""
