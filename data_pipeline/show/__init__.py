"""What a person looks at: pages that carry all they show, masks over frames, `flowmask cache inspect`.

Imports `read` and below; draws, and changes nothing.
"""
