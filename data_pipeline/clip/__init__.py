"""From a video and a config to a clip and its pixels: its frames, size and crop. Pure functions.

Imports `formats` and `sources`; knows no cache.
A new way to sample is a function in `frames` and a branch in `clips`.
"""
