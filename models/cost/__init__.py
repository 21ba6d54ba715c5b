"""The cost of a pass: FLOPs by formula, and FLOPs and memory counted on the meta device.

Imports no other part of FlowMask, and nothing in `models` imports it; used by plans and by the MFU.
A new count is a file here.
"""
