"""Weights in other projects' layouts: a Wan2.1 folder, FlowRVS .pth files, the tiny Wan in this package.

Imports the files of `models`; a new layout of weights is a file here.
"""
