"""Safe output to people and files: text without control characters, values without secrets, this user's mark.

Knows no config and no run; imports the models' errors. A new form of secret goes to `secrets`.
"""
