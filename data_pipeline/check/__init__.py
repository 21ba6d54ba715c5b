"""Checks and repairs caches: `flowmask cache verify`, the comparison of two caches, and `repair`.

Imports everything above; a new check is a file here, called by `verify`.
"""
