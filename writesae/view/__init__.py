"""`writesae view`: the atom page of a dictionary with a live prompt box, served on this machine alone.

session.py   a text read by the model: tokens, writes, which atoms fire where
changes.py   what a reader may do to a write, as edits of the model
outcome.py   what the edits do to the next-token distributions, and to the text that follows
requests.py  what a request may ask for
guard.py     who may ask: this machine's own page, with small JSON bodies
server.py    the application around them, serving.py runs it
live.py      the panel, and the page it stands in
saved.py     the data of a page that was written before

Only requests and server need the extra `view` (fastapi, uvicorn).
"""
