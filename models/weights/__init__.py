"""Weights as other people store them: a Wan2.1 folder, FlowRVS .pth files, the tiny Wan that ships with us.

Imports the files of `models`; a new layout of weights is a file here.
"""
