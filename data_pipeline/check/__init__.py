"""Is a cache right, and how to make it right: `flowmask cache verify`, its comparison of two caches, `repair`.

Imports everything above; a new check is a file here, called by `verify`.
"""
