"""Outputs for people: overlay videos, figures and run-length masks from mask PNGs; the model card of an export."""
