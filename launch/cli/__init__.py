"""The command: what a person types, one file a group of commands. Imported by `__main__` alone."""
