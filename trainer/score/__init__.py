"""From a dataset and weights to scores: their store, intervals, slices, the report.

Imports `predict`, `state` and `track`. A new metric is a file in `metrics`, a new slice an entry in `slices`.
"""
