"""`flowmask serve`: a page on which people segment clips with weights that are loaded once.

`service.py` knows people, turns and files, but no Gradio; `page.py` is the only importer of Gradio; `server.py` is the
process: its socket, its end, and what it refuses before Gradio sees it; `alone.py` keeps it from other machines.
A limit of what people may ask for goes into `limits.py`.
"""
