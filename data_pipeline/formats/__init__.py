"""Foreign file formats: run-length masks, pictures, video files, pickles, JSON; what may stand in their fields.

Imports `models` alone; a new format is a file here, used by `sources`.
"""
