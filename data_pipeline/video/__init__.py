"""Reading and writing video files: the only folder that imports PyAV and decord.

Frame i is the i-th picture that a player shows. PyAV, which decodes forward, reads every file. decord, which
seeks, reads only files whose packets show that each of its seeks is correct. Imports `models`.
"""
