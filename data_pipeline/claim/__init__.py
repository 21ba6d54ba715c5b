"""Who works on which unit of a build, without a coordinator: claims, and leases as signs of life.

Imports `models` alone; knows nothing of what a unit is.
A new way to share work is a function in `claims`.
"""
