"""Training, scoring and predicting. Imports `data_pipeline` and `models`.

The files here are ground: the config of a run, the process group. A new config key is a field in `config`.
"""
