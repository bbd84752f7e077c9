"""Random edits of all three kinds, over LENGTH positions and BATCH rows, for tests that hold for any edit."""

import random
from functools import lru_cache, wraps

import torch
from hypothesis import strategies as st

from hooked_recurrent import ActivationEdit, StateEdit, WriteEdit
from tests.hooked_recurrent.models import tiny_model, tokens_of

LENGTH, BATCH = 11, 2
# Hooks of values whose sign the recurrence counts on: scaled, never replaced or shifted.
SIGNED = ("hook_beta", "hook_dt", "hook_scale", "hook_log_decay")
REFUSED = ("hook_attn_scores", "hook_pattern", "hook_write", "hook_state")
READINGS = ("in_recurrence", "cache")


@lru_cache
def model_of(layer_types, seed=1):
    return tiny_model(layer_types, seed=seed).requires_grad_(False)


@lru_cache
def activations(layer_types):
    """Per hook that an ActivationEdit can change, the shape of its activation behind [batch, pos]."""
    model = model_of(layer_types)
    _, cache = model.run_with_cache(tokens_of(model, 1, 1))
    return {name: tuple(tensor.shape[2:]) for name, tensor in cache.items() if not name.endswith(REFUSED)}


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def composite(function):
    """st.composite for what calls the library: its shape checks pick items by `random`, whose state hypothesis guards."""

    @wraps(function)
    def drawn(draw, *args, **options):
        before = random.getstate()
        try:
            return function(draw, *args, **options)
        finally:
            random.setstate(before)

    return st.composite(drawn)


@composite
def positions(draw):
    """(position, how many these are)."""
    where = draw(st.sampled_from(["int", "slice", "stride", "open", "tensor"]))
    first, last = sorted((draw(st.integers(0, LENGTH - 1)), draw(st.integers(0, LENGTH - 1))))
    position = {
        "int": first,
        "slice": slice(first, last + 1),
        "stride": slice(first, last + 1, 2),
        "open": slice(first, None),
        "tensor": torch.tensor(draw(st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=4, unique=True))),
    }[where]
    return position, 1 if where == "int" else len(torch.arange(LENGTH)[position])


@composite
def places(draw):
    """position, rows, and a shape in front of what is put there."""
    position, count = draw(positions())
    rows = draw(st.sampled_from([None, 0, 1, torch.tensor([1, 0])]))
    n_rows = 1 if isinstance(rows, int) else BATCH
    return position, rows, draw(st.sampled_from([(), (count,), (1, count), (n_rows, 1), (n_rows, count)]))


@composite
def write_edits(draw, model):
    cfg = model.cfg
    op = draw(st.sampled_from(["replace", "add", "delete", "scale"]))
    form = draw(st.sampled_from(["additive", "net"])) if op in ("replace", "delete") else "additive"
    position, rows, lead = draw(places())
    sides = {}
    if op in ("replace", "add"):
        seed = draw(st.integers(0, 999))
        widths = {"key": cfg.d_k, "value": cfg.d_v}
        sides = {name: random_tensor(*lead, width, seed=seed) for name, width in widths.items()}
    return WriteEdit(
        draw(st.sampled_from(cfg.recurrent_layers)),
        draw(st.integers(0, cfg.n_heads - 1)),
        position,
        op,
        scale=draw(st.sampled_from([0.0, -0.5, 2.0])) if op == "scale" else None,
        batch=rows,
        form=form,
        reading=draw(st.sampled_from(READINGS)),
        **sides,
    )


@composite
def state_edits(draw, model):
    cfg = model.cfg
    op = draw(st.sampled_from(["replace", "add", "delete", "scale"]))
    position, rows, lead = draw(places())
    matrix = None
    if op in ("replace", "add"):
        matrix = random_tensor(*lead, cfg.d_k, cfg.d_v, seed=draw(st.integers(0, 999)))
    return StateEdit(
        draw(st.sampled_from(cfg.recurrent_layers)),
        draw(st.integers(0, cfg.n_heads - 1)),
        position,
        op,
        matrix=matrix,
        scale=draw(st.sampled_from([0.0, -0.5, 1.5])) if op == "scale" else None,
        batch=rows,
        reading=draw(st.sampled_from(READINGS)),
    )


@composite
def activation_edits(draw, model, in_blocks=False):
    shapes = activations(model.cfg.layer_types)
    names = [name for name in shapes if name.startswith("blocks.") or not in_blocks]
    hook = draw(st.sampled_from(names))
    tail, head = shapes[hook], None
    if (".mixer." in hook or ".attn." in hook) and draw(st.booleans()):
        head, tail = draw(st.integers(0, tail[0] - 1)), tail[1:]
    position, rows, lead = draw(places())
    op = "scale" if hook.endswith(SIGNED) else draw(st.sampled_from(["replace", "add", "scale"]))
    value = draw(st.sampled_from([0.5, 1.5]))
    if op != "scale" and draw(st.booleans()):
        value = random_tensor(*lead, *tail, seed=draw(st.integers(0, 999)))
    return ActivationEdit(hook, position, value, head, rows, op)


def any_edits(model):
    return st.one_of(write_edits(model), state_edits(model), activation_edits(model))
