"""`flowmask compare`: compares published evaluations, without changing them.

The numbers need only scores.json; sentences and pictures need the dataset and the masks.
"""
