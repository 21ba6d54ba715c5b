"""What of a prediction is looked at or handed on: overlay videos, figures, run-length masks; drawn from mask PNGs."""
