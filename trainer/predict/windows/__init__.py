"""Videos of any length, one window of frames at a time: the cuts, and one answer from all windows."""
