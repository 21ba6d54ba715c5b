"""FlowMask's files that anybody may have written: opened only if they are plain files, parsed within limits, sealed.

Knows nothing of their contents, and raises Python's own errors (OSError, ValueError); the reader of each kind of file
turns them into a message. Imports no other part of FlowMask, so every folder may use it.
"""
