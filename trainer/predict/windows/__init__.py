"""Videos of any length, a window of frames at a time: where each begins, and one answer out of those of all."""
