"""Evaluations beside each other: `flowmask compare`. Reads what they published, and changes none of it.

The numbers need scores.json alone; sentences and pictures come from the dataset and the masks, where these still are.
"""
