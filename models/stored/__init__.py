"""Files of ours that anybody may have made: opened only if they are plain files, parsed within limits, sealed.

Knows nothing of their contents, and raises what Python raises (OSError, ValueError); the reader of each kind of file
turns that into a message. Imports nothing of ours, so that every folder may use it.
"""
