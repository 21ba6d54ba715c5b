"""From a cache to batches: all that training imports of the data pipeline.

Imports `cache`; a new way to read (such as `stream`) is a file here and a branch in `batches`.
"""
