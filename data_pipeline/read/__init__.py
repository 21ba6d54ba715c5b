"""From a cache to batches: the part of the data pipeline that training imports.

Imports `cache`; a new way to read (such as `stream`) is a file here and a branch in `batches`.
"""
