"""Small runs of every rule, native and edited, fresh and continued, and the memory's algebra by brute force."""

from functools import lru_cache

import torch
from hypothesis import strategies as st

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import tiny_model, tokens_of

LAYER, HEADS, D_K, D_V = 1, 4, 3, 5
EXACT = 1e-9
"""Tolerance relative to the largest entry, in float64."""


@lru_cache
def model_of(rule):
    return tiny_model((rule, rule), seed=1).requires_grad_(False)


def vectors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "key": torch.randn(D_K, generator=generator, dtype=torch.float64),
        "value": torch.randn(D_V, generator=generator, dtype=torch.float64),
    }


edits = st.builds(
    lambda op, form, head, position, seed: WriteEdit(
        LAYER,
        head,
        position,
        op,
        scale=-1.5 if op == "scale" else None,
        form=form if op in ("delete", "replace") else "additive",
        **(vectors(seed) if op in ("add", "replace") else {}),
    ),
    st.sampled_from(["replace", "add", "delete", "scale"]),
    st.sampled_from(["additive", "net"]),
    st.integers(0, HEADS - 1),
    st.one_of(st.integers(0, 9), st.just(slice(2, 7))),
    st.integers(0, 99),
)
runs = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "before": st.integers(0, 6),
        "edits": st.lists(edits, max_size=3),
        "seed": st.integers(0, 50),
    }
)


def cache_of(rule, length=9, before=0, edits=(), seed=0):
    """The cache of `length` tokens, read on from the state after `before` others. Edits beyond the text are left out."""
    model = model_of(rule)
    tokens = tokens_of(model, length=before + length, seed=seed)
    state = model(tokens[:, :before], return_state=True)[1] if before else None
    kept = [edit for edit in edits if not isinstance(edit.position, int) or edit.position < before + length]
    kept = [edit for edit in kept if not isinstance(edit.position, slice) or before + length >= 7]
    _, cache = model.run_with_cache(tokens[:, before:], state=state, edits=kept)
    return cache


def transition(factors, position):
    """diag(d) + a b^T as matrices [batch, head, d_k, d_k]."""
    decay = factors.log_decay[:, position].exp()
    decay = decay if factors.vector_decay else decay[..., None].expand(*decay.shape, factors.d_k)
    matrix = torch.diag_embed(decay)
    if factors.erases:
        whole = factors.decoupled()
        matrix = matrix + whole.erase[:, position][..., :, None] * whole.probe[:, position][..., None, :]
    return matrix


def product(factors, until, after):
    """T(until <- after): the product of the transitions of after + 1 ... until, the latest on the left; I when empty."""
    batch, _, heads, d_k = factors.query.shape
    matrix = torch.eye(d_k, dtype=torch.float64).expand(batch, heads, d_k, d_k)
    for position in range(after + 1, until + 1):
        matrix = transition(factors, position) @ matrix
    return matrix
