"""Output for people: self-contained pages, masks over frames, `flowmask cache inspect`.

Imports `read` and below; draws and changes nothing.
A new section of the page is a function in `inspect_page`.
"""
