"""Videos of any length, a window of frames at a time: the cuts, and one answer from all windows."""
