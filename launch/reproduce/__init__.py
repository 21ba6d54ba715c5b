"""`flowmask reproduce`: the rows of a published table, each trained over seeds, and ours beside theirs on one page.

A study's YAML (configs/paper.yaml) becomes a curriculum, which trains, skips what is done and goes on after a kill.
"""
