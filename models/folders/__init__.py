"""Folders of results: whose they are, who writes them now, and how new results take the place of older ones.

Only this folder marks and locks folders, and deletes results. It knows files, not what stands in them.
"""
