"""Mixed precision: which products may be narrow, and that nothing else is."""

from collections.abc import Iterator
from contextlib import contextmanager

from writesae.sae import WriteSAE


@contextmanager
def scoring_in(precision: str, sae: WriteSAE) -> Iterator[None]:
    """Stand-in."""
    yield
