"""Assigns the units of a build to workers without a coordinator: claims, and leases as heartbeats.

Imports only `models`; knows nothing about the content of a unit.
A new way to share work is a function in `claims`.
"""
