"""A served page of a small random dictionary on a bundled model, for the tests that need one."""

import threading
import time
from contextlib import contextmanager
from functools import cache

import torch

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import standard_library
from writesae import Passages, WriteSAE, WriteSAEConfig, passages
from writesae.browser import AtomBrowserData, BrowserConfig, collect
from writesae.stream.sources import Source
from writesae.stream.sources import collect as records_of
from writesae.view.live import live_page
from writesae.view.requests import BOUNDS
from writesae.view.server import bind, make_server
from writesae.view.session import Session, session

MODEL, LAYER, HEAD, ATOMS = "tiny-gated-deltanet", 1, 3, 24


@cache
def small() -> tuple[Session, AtomBrowserData, Passages]:
    """A session whose atoms are writes of the model itself, and what a page shows of them. Untrained; change none of it."""
    model = HookedRecurrentModel.from_pretrained(MODEL)
    held = passages(standard_library("heldout")[:6], model, 64, split="heldout", max_passages=6, seed=0)
    torch.manual_seed(0)
    sae = WriteSAE(WriteSAEConfig(d_k=32, d_v=32, n_atoms=ATOMS, k=4, start="samples"))
    source = Source(f"blocks.{LAYER}.mixer.hook_write", HEAD)
    writes = records_of(model, held.tokens, [source])[source]
    sae.calibrate_(writes["key"].flatten(0, 1), writes["value"].flatten(0, 1))
    sae.provenance.update(model=MODEL, hook=source.hook, layer=LAYER, head=HEAD, form="additive")
    config = BrowserConfig(tested_atoms=2, firings_per_atom=2, readout_firings=2)
    data = collect(model, sae, held.tokens, layer=LAYER, head=HEAD, config=config)
    return session(model, sae), data, held


@contextmanager
def served(study: Session, data: AtomBrowserData, prompt: str):
    """The address of a server that runs in a thread of its own until the block ends."""
    with bind(0) as listening:
        server = make_server(study, live_page(study, data, BOUNDS, prompt), listening)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(30)
