"""From a dataset and weights to scores: their store, the report.

Imports `predict`, `state` and `track`. A new metric is a file in `metrics`.
"""
