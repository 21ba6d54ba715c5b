"""Folders of results: their owner, their current writer, and how new results replace older ones.

Only this folder marks and locks folders, and deletes results. It knows files, not their content.
"""
