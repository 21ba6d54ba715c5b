"""`flowmask reproduce`: the rows of a published table, each trained over seeds and compared with the published one.

A study's YAML (configs/paper.yaml) becomes a curriculum, which skips finished stages and continues after a kill.
"""
