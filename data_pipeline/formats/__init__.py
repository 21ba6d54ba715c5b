"""Foreign file formats: run-length masks, pictures, video files, pickles, JSON; and checks of their fields.

Imports only `models`; a new format is a file here, used by `sources`.
"""
