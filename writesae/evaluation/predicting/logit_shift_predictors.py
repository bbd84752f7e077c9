"""What adding a rank-1 matrix to one write does to later logits, predicted with nothing fitted.

The matrix v w^T is added to the write at t of one head. Under teacher forcing the layers below and the head's own transitions
stay as they were, so what the queries of this head read changes by exactly (v~_s . q_s) w at every s >= t, with v~_t = v
and v~_s = d_s v~_{s-1} + a_s (b_s . v~_{s-1}). The predictors differ in what they make of this change:

    three_factor   gate product x query match x unembedding match (WriteSAE, arXiv:2605.12770, section 3, with the sides paired
                   as they must be: v with the query, w with W_O): drops the erase, the layers above, and how the norms answer;
                   every norm counts as the plain factor that it is per channel
    in_layer       the exact change of the read, through the local Jacobians of the read-out and of the final norm
    first_order    v^T Lambda_t w: the derivative of the logit itself, through the erase, all layers, all later positions
    norm_exact     the edited layer's mixer exactly, its read-out included; what comes above to first order
    norm_midpoint  the same with the gradient taken where half of the mixer's change has been made, not where none has: it asks
                   the model once per edit, so it explains a shift rather than predicting it from the untouched run

All are in logits and per target; an edit may be a sum of several outer products.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from hooked_recurrent.layers.norm import LayerNorm
from writesae.evaluation.predicting.logit_shift_context import Cell, Context, Layer

PREDICTORS = ("three_factor", "in_layer", "first_order", "norm_exact", "norm_midpoint")


@dataclass(frozen=True)
class Added:
    """Matrices that are added to the write at t, one edit each: sum_m key_m value_m^T, amplitudes included."""

    key: Float[Tensor, "edit term d_k"]
    """Key sides."""
    value: Float[Tensor, "edit term d_v"]
    """Value sides."""


@torch.no_grad()
def predict(context: Context, cell: Cell, added: Added, names: tuple[str, ...] = PREDICTORS) -> dict[str, Tensor]:
    """Predicted shifts [edit, row] of the targets' logits, per predictor that is asked for."""
    native, made = context.layer(cell[0]), {}
    change = read_change(context, cell, added)
    if "three_factor" in names:
        made["three_factor"] = three_factor(context, cell, added, native)
    if "in_layer" in names:
        made["in_layer"] = in_layer(context, cell, change, native)
    if "first_order" in names:
        made["first_order"] = first_order(context.lambdas(cell), added)
    if "norm_exact" in names or "norm_midpoint" in names:
        mixed = mixer_change(context, cell, change, native)
        gradient = context.gradient(f"blocks.{cell[0]}.hook_mixer_out")
        made["norm_exact"] = torch.einsum("epm,rpm->er", mixed.to(gradient), gradient)
        if "norm_midpoint" in names:
            made["norm_midpoint"] = halfway(context, cell[0], mixed)
    return {name: made[name] for name in names}


def propagated(
    context: Context, cell: Cell, key: Float[Tensor, "edit term d_k"], *, erase: bool = True
) -> Float[Tensor, "pos edit term d_k"]:
    """The key side of an added write at every position of the segment; `erase` False lets it only decay."""
    log_decay, reader, probe = (context.role(cell, name) for name in ("log_decay", "erase", "probe"))
    assert log_decay is not None  # every rule has one
    decay = log_decay.exp()
    carried = [key.to(decay)]
    for s in range(1, context.length):
        before = carried[-1]
        after = decay[s] * before
        if erase and reader is not None and probe is not None:
            after = after + (before @ probe[s].to(before))[..., None] * reader[s].to(before)
        carried.append(after)
    return torch.stack(carried)


def read_change(context: Context, cell: Cell, added: Added, *, erase: bool = True) -> Float[Tensor, "edit pos d_v"]:
    """What the head's queries read more than before, at every position: exact unless the erase is dropped."""
    keys = propagated(context, cell, added.key, erase=erase)
    query = context.role(cell, "query")
    assert query is not None
    match = torch.einsum("petk,pk->ept", keys, query.to(keys))
    return torch.einsum("ept,etv->epv", match, added.value.to(keys))


def three_factor(context: Context, cell: Cell, added: Added, native: Layer) -> Float[Tensor, "edit row"]:
    """The paper's formula with the sides paired correctly; each norm enters as its scale in the untouched run."""
    layer, head = cell
    read = read_change(context, cell, added, erase=False) * channel_gain(context, cell, native)
    through = read @ context.model.blocks[layer].W_O[head].to(read)
    norm = context.model.ln_final
    if isinstance(norm, LayerNorm):
        through = through - through.mean(-1, keepdim=True)
    weight = norm.weight + getattr(norm, "offset", 0.0)
    return _unembed(context, through / context.cache["ln_final.hook_scale"][0].to(through) * weight.to(through))


def channel_gain(context: Context, cell: Cell, native: Layer) -> Float[Tensor, "pos d_v"]:
    """How much of a channel's own change gets through the read-out: gate times weight over the norm's frozen scale.

    The diagonal of the read-out's Jacobian, which has this in it up to one part in the norm's width, for every rule alike.
    """
    d_v = native.read.shape[-1]
    one_each = torch.eye(d_v, dtype=native.read.dtype, device=native.read.device)
    answer = _through_read_out(context, cell, one_each[:, None].expand(-1, context.length, -1), native)
    return torch.einsum("vpv->pv", answer[:, :, cell[1]])


def in_layer(
    context: Context, cell: Cell, change: Float[Tensor, "edit pos d_v"], native: Layer
) -> Float[Tensor, "edit row"]:
    """The exact change of the read through the local Jacobians of read-out and final norm, and nothing between."""
    z = _through_read_out(context, cell, change, native)
    mixed = torch.einsum("ephv,hvm->epm", z, context.model.blocks[cell[0]].W_O.to(z))
    resid = context.last_resid.to(mixed).repeat(len(mixed), 1, 1)
    with context.model.clock.running(context.position, context.length):
        _, normed = jvp(context.model.ln_final, (resid,), (mixed,))
    return _unembed(context, normed)


def first_order(lambdas: Float[Tensor, "row d_k d_v"], added: Added) -> Float[Tensor, "edit row"]:
    """v^T Lambda_t w, summed over the terms of an edit."""
    return torch.einsum("etk,rkv,etv->er", added.key.to(lambdas), lambdas, added.value.to(lambdas))


def mixer_change(
    context: Context, cell: Cell, change: Float[Tensor, "edit pos d_v"], native: Layer
) -> Float[Tensor, "edit pos d_model"]:
    """The exact change of the edited layer's mixer output: the changed read through the true read-out, and W_O."""
    layer, head = cell
    mixer, edits = context.model.blocks[layer].mixer, len(change)
    with context.model.clock.running(context.position, context.length):
        read = native.read.repeat(edits, 1, 1, 1)
        before = mixer.read_out(native.read, native.beside)
        read[:, :, head] += change.to(read)
        after = mixer.read_out(read, _rows(native.beside, edits))
    return torch.einsum("ephv,hvm->epm", after - before, mixer.W_O.to(after))


@torch.no_grad()
def reach(context: Context, cell: Cell, added: Added) -> dict[str, Float[Tensor, "edit row"]]:
    """How far an edit carries what norms look at, from t to each target: what decides whether a derivative still holds.

    read_change is |change of the head's read| / |its read|, which the read-out's norm sees; stream_change is |change of the
    mixer's output| / |residual stream behind it|, which all norms above see: the largest on the way. Both are exact and need
    no edited run.
    """
    layer, native = cell[0], context.layer(cell[0])
    change = read_change(context, cell, added)
    mixed = mixer_change(context, cell, change, native)
    stream = context.trunk.inputs[layer][0, context.segment] + context.cache[f"blocks.{layer}.hook_mixer_out"][0]
    shares = {
        "read_change": change.norm(dim=-1) / native.read[0, :, cell[1]].norm(dim=-1),
        "stream_change": mixed.norm(dim=-1) / stream.norm(dim=-1),
    }
    return {name: share.cummax(dim=1).values[:, context.targets.horizon] for name, share in shares.items()}


def halfway(context: Context, layer: int, mixed: Float[Tensor, "edit pos d_model"]) -> Float[Tensor, "edit row"]:
    """Derivative along a change of the mixer's output, at the point where half of it is made.

    In forward mode, so that one run gives every target; softmax layers take the attention that has such a derivative.
    """
    model, targets = context.model, context.targets
    at = torch.arange(context.length, device=mixed.device).expand(len(mixed), -1)

    def shifted(amount: Tensor) -> Tensor:
        hooks = [(f"blocks.{layer}.hook_mixer_out", lambda out, hook: out + amount * mixed.to(out))]
        with model.hooks(fwd_hooks=hooks):
            resid, rows = context.trunk.inputs[layer][:, context.segment], len(mixed)
            logits = model.run_from(
                layer, resid, context.state, rows=rows, shared=context.shared, at=at, backend="chunked"
            )
        return targets.of(logits)

    one = torch.ones((), dtype=mixed.dtype, device=mixed.device)
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = jvp(shifted, (one / 2,), (one,))
    return derivative


def _through_read_out(
    context: Context, cell: Cell, change: Float[Tensor, "edit pos d_v"], native: Layer
) -> Float[Tensor, "edit pos head d_v"]:
    """The local Jacobian of the read-out over all heads, applied to a change of what one head reads."""
    rows = len(change)
    tangent = torch.zeros_like(native.read).repeat(rows, 1, 1, 1)
    tangent[:, :, cell[1]] = change.to(tangent)
    beside, mixer = _rows(native.beside, rows), context.model.blocks[cell[0]].mixer
    with context.model.clock.running(context.position, context.length):
        # forward mode writes to its inputs' duals, so the repeated read has to be a real copy
        _, z = jvp(lambda read: mixer.read_out(read, beside), (native.read.repeat(rows, 1, 1, 1),), (tangent,))
    return z


def _rows(beside: object, rows: int) -> object:
    return tree_map_only(Tensor, lambda tensor: tensor.expand(rows, *tensor.shape[1:]), beside)


def _unembed(context: Context, change: Float[Tensor, "edit pos d_model"]) -> Float[Tensor, "edit row"]:
    targets = context.targets
    directions = context.model.W_U[:, targets.token].to(change)
    return torch.einsum("erm,mr->er", change[:, targets.horizon], directions)
