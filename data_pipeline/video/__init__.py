"""Reading and writing video files: the only folder that imports PyAV and decord.

Frame i is the i-th picture that a player shows. Every file can be read by PyAV, which decodes forward; decord, which
seeks, reads those files whose packets show that each of its seeks is right. Imports `models`.
"""
