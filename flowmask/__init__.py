"""FlowMask: referring video segmentation by flow matching on Wan2.1.

The rooms are `flowmask.models`, `flowmask.data_pipeline`, `flowmask.trainer` and `flowmask.launch`. Their folders
lie at the top of the repository; in a checkout the links beside this file lead there.
"""
