"""Files of ours that anybody may have made: opened only if they are plain files, parsed within limits, sealed.

Knows nothing of what stands in them, and raises what Python raises (OSError, ValueError); whoever reads a kind of
file says the rest. Imports nothing of ours, so that every folder may use it.
"""
