"""`python -m writesae.cli`, as `torchrun -m writesae.cli train ...` starts it."""

from writesae.cli import app

app()
