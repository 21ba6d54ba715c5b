"""`flowmask toy`: a tiny Wan, small datasets in the published layouts, and the overlay under which every config runs.

Its pictures are synthetic scenes. For a new dataset, add a writer here and an entry in `toy.py`.
"""
