"""The command: what a person types, one file a group of commands. Parses, prints and exits.

Imported by `__main__` alone; imports what does the work inside each command, so that `--help` waits for nothing.
A new command is a function in `main`.
"""
