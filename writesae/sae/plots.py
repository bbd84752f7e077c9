"""Pictures of dictionaries and their codes. Each gives a new matplotlib Figure and touches no global state of pyplot.

    activation_histogram   how strongly one atom fires, where it fires
    firing_rates           how often every atom fires, from the busiest down
    training_curves        the log of a training run

One atom as a heat map is `sae.figure(atom)`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from writesae.sae.codes import Codes

CURVES = {"fvu": "unexplained variance", "l0": "active atoms", "dead": "dead atoms"}
"""What a log may hold, in the order drawn, and what to call it."""


def activation_histogram(codes: Codes, atom: int, *, bins: int = 40) -> Figure:
    """Histogram of an atom's coefficients (raw units) at the tokens where it fires; the title says how often that is.

    Raises:
        ValueError: an atom that fires at none of these tokens.
    """
    coefficients = codes.of(atom).detach().double().cpu().flatten()
    fired = coefficients[coefficients > 0].numpy()
    if len(fired) == 0:
        raise ValueError(f"atom {atom} fires at none of these {len(coefficients)} tokens, so there is nothing to draw")
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(fired, bins=bins, color="C1")
    share = len(fired) / len(coefficients)
    axes.set(xlabel="coefficient", ylabel="tokens", xlim=(0, None))
    axes.set_title(f"atom {atom} fires at {len(fired):,} of {len(coefficients):,} tokens ({share:.3%})", fontsize=10)
    return figure


def firing_rates(codes: Codes, n_atoms: int) -> Figure:
    """The share of tokens at which each atom fires (log scale), from the busiest down; silent ones are counted, not drawn."""
    counts = torch.bincount(codes.indices[codes.active].flatten().cpu(), minlength=n_atoms).double()
    rates = (counts / codes.indices.shape[:-1].numel()).sort(descending=True).values.numpy()
    alive = int((rates > 0).sum())
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(alive), rates[:alive], color="C0", marker="." if alive == 1 else "")
    axes.set(xlabel="atoms, busiest first", ylabel="share of tokens", xlim=(0, n_atoms))
    if alive:  # a log axis has no place for zeros alone
        axes.set_yscale("log")
    axes.set_title(f"{alive:,} of {n_atoms:,} atoms fire", fontsize=10)
    return figure


def training_curves(log: Sequence[Mapping[str, int | float]]) -> Figure:
    """Unexplained variance (log scale), active and dead atoms by training step; `ValueError` for an empty log."""
    if not log:
        raise ValueError("the log has no lines, so there is no training to draw")
    shown = [name for name in CURVES if any(name in line for line in log)]
    figure = Figure(figsize=(5.6, 1.8 * len(shown) + 0.4), layout="constrained")
    panels = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for index, (axes, name) in enumerate(zip(panels, shown, strict=True)):
        lines = [(line["step"], line[name]) for line in log if name in line]
        axes.plot(*zip(*lines, strict=True), color=f"C{index}", marker="." if len(lines) == 1 else "")
        axes.set_ylabel(CURVES[name])
        if name == "fvu" and all(value > 0 for _, value in lines):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
    panels[-1].set_xlabel("training step")
    return figure
