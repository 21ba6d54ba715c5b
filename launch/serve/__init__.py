"""`flowmask serve`: a page on which people segment clips with weights that are loaded once.

`service.py` handles users, turns and files, without Gradio; only `page.py` imports Gradio; `server.py` is the
process: its socket, its end, and its checks before Gradio; `alone.py` blocks connections to other machines.
A limit on requests goes into `limits.py`.
"""
