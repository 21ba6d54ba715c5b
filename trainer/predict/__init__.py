"""From a checkpoint to masks: weights by name, a segmenter, prediction of any video, overlays, exports.

Imports `state`, the objectives, `data_pipeline.clip` and `show`; independent of ranks. A new part of weights is an
object in `parts`.
"""
