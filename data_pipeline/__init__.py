"""Datasets to latent shards to training batches; imports `models` only."""
