"""The atom browser: one self-contained page that shows every atom of a dictionary.

    data = collect(model, sae, tokens, layer=2, head=0)      # atoms.py: run the model on held-out text, one record per atom
    html = render(data)                                      # page.py: everything in one string, nothing beside it
    write_page("atoms.html", data)                           # the same, as a file that is there whole or not at all

`data.py` says what a record is (plain numpy and pandas, no tensors), `contexts.py` cuts the text around firings, `readout.py`
predicts which tokens an atom promotes, `packing.py` makes the data small. A live page is the same page with more in it:

    html = render(data, live=True, markup="<section>..</section>", styles=[css], scripts=[javascript])

Its scripts find the page's own tools as the global object `AtomPage` (the head of static/base.js lists them).
"""

from writesae.browser.atoms import BrowserConfig, collect
from writesae.browser.data import AtomBrowserData
from writesae.browser.page import render, write_page

__all__ = ["AtomBrowserData", "BrowserConfig", "collect", "render", "write_page"]
