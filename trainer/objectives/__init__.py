"""What is learned: an objective is one file here and one line in the registry."""
