"""`flowmask demo`: every step of a real run, on a small synthetic dataset and a tiny Wan.

Imports `dispatch` and the folders below; its sizes and configs are in configs/demo.yaml and configs/demo/.
A new stage is a config in configs/demo/ and a step in `demo`.
"""
