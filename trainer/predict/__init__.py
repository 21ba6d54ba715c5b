"""From a checkpoint to masks: weights by name, a segmenter, prediction of any video, overlays, exports.

Imports `state`; knows no ranks.
"""
