"""Training, scoring and predicting. Imports `data_pipeline` and `models`.

The files here are shared by the folders: the config of a run, the process group, the phases of a rank's steps. A new
config key is a field in `config`.
"""
