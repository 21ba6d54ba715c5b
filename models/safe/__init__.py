"""What leaves for a person or a file: text without control characters, values without secrets, this user's own mark.

Knows no config and no run; imports the models' errors. A new form of secret goes to `secrets`.
"""
