"""Mask decoders other than the VAE's own (`models/mask_decoder.py`): the light one, and how weights of the two are
recognised.

Imports the files of `models`. A further decoder is a file here, and a line in `either.py`.
"""
