"""Foreign file formats: run-length masks, video files, pickles and JSON files too large to hold.

Imports `models` alone; a new format is a file here, used by `sources`.
"""
