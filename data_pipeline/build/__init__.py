"""From a dataset to a cache: `flowmask cache build`, its passes, its stages and its progress.

Imports everything above; a new pass over the clips is a file here, called by `build`.
"""
