"""The command line: one file for each group of commands. Parses, prints and exits.

Only `__main__` imports it. Each command imports its own code inside the function, so that `--help` is fast.
A new command is a function in `main`.
"""
