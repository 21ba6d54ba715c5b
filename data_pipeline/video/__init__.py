"""Reading and writing video files: the only folder that imports PyAV and decord.

Frame i is the i-th picture of a player. PyAV, which decodes forward, can read every file. decord, which
seeks, reads only files whose packets show that each of its seeks is correct. Imports `models`.
"""
