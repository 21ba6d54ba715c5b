"""From a dataset and weights to scores: J and F, their store, the report.

Imports `predict`; a new metric is a file in `metrics`.
"""
