"""Datasets to latent shards to training batches. Imports only `models`.

The files here are shared by the folders: config sections, random numbers. A new config key is a field in `config`.
"""
