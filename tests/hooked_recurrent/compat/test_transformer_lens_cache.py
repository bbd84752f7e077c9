"""transformer_lens's methods of a cache: the parts of every model's residual stream add up to it, and to its logits."""

from functools import lru_cache

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import HYBRID, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-12
MAMBA = ("mamba2", "mamba2")


@lru_cache
def run_of(layer_types=HYBRID, tied=True):
    """A model, its logits and its cache."""
    model = tiny_model(layer_types, seed=1, tied=tied).requires_grad_(False)
    return model, *model.run_with_cache(tokens_of(model, 3, 5))


@over_stacks
def test_the_parts_of_the_stream_add_up(layer_types):
    model, _, cache = run_of(layer_types)
    n_layers, mlp = model.cfg.n_layers, model.cfg.d_mlp is not None
    for layer in [*range(1, n_layers), None]:
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        depth = n_layers if layer is None else layer
        per_layer = [[f"{index}_mixer_out", *([f"{index}_mlp_out"] if mlp else [])] for index in range(depth)]
        assert labels == ["embed", *sum(per_layer, [])] and len(stack) == len(labels)
        expected = cache["resid_post", depth - 1]
        assert distance(stack.sum(0), expected) <= EXACT
        for expand in (False, True):
            full, names = cache.get_full_resid_decomposition(layer, expand_neurons=expand, return_labels=True)
            assert distance(full.sum(0), expected) <= EXACT and len(full) == len(names) == len(set(names))
    if mlp:
        middle = cache["resid_mid", 1]
        assert distance(cache.decompose_resid(1, mlp_input=True).sum(0), middle) <= EXACT
        assert distance(cache.get_full_resid_decomposition(1, mlp_input=True).sum(0), middle) <= EXACT
    mixers, mlps = (cache.decompose_resid(mode=mode, incl_embeds=False) for mode in ("attn", "mlp"))
    assert len(mixers) == n_layers and len(mlps) == n_layers * mlp
    assert cache.decompose_resid(0, incl_embeds=False).shape == (0, 3, 5, 12)


@over_stacks
def test_heads_add_up_to_their_mixer(layer_types):
    model, _, cache = run_of(layer_types)
    stack, labels = cache.stack_head_results(return_labels=True)
    heads = [block.W_O.shape[0] for block in model.blocks]
    assert labels == [f"L{layer}H{head}" for layer, count in enumerate(heads) for head in range(count)]
    for layer, part in enumerate(stack.split(heads)):
        bias = model.accumulated_bias(layer + 1) - model.accumulated_bias(layer)
        assert distance(part.sum(0) + bias, cache["mixer_out", layer]) <= EXACT
    rest, names = cache.stack_head_results(1, incl_remainder=True, return_labels=True, pos_slice=-1)
    assert names[-1] == "remainder" and distance(rest.sum(0), cache["resid_post", 0][:, -1]) <= EXACT
    cut = cache.apply_slice_to_batch_dim((0, 2))
    cut.compute_head_results()
    cut.compute_head_results()
    assert distance(cut["result", 1], stack.split(heads)[1][:, :2].movedim(0, 2)) <= EXACT


@over_stacks
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unit", ["component", "head", "neuron"])
def test_contributions_add_up_to_the_logits(layer_types, tied, unit):
    _, logits, cache = run_of(layer_types, tied)
    lead = logits - logits[..., [5]]
    for where in (None, -1, (1, 4)):
        found, labels = cache.logit_contributions(3, 5, unit=unit, pos_slice=where)
        expected = lead[..., 3] if where is None else lead[:, -1, 3] if where == -1 else lead[:, 1:4, 3]
        assert len(found) == len(labels) == len(set(labels)) and distance(found.sum(0), expected) <= EXACT
    rows = torch.tensor([1, 2, 3])
    found, _ = cache.logit_contributions(rows, unit=unit)
    assert distance(found.sum(0), logits.gather(2, rows[:, None, None].expand(3, 5, 1))[..., 0]) <= EXACT
    places = tokens_of(run_of(layer_types, tied)[0], 3, 5, seed=4)
    found, _ = cache.logit_contributions(places, unit=unit)
    assert distance(found.sum(0), logits.gather(2, places[..., None])[..., 0]) <= EXACT


@over_stacks
def test_norms_of_parts(layer_types):
    """Of the parts together, less the norm's bias, it is what the norm gave; alone and recomputed, the norm itself."""
    model, _, cache = run_of(layer_types)
    norms = [(0, False, model.blocks[0].ln1, "blocks.0.ln1"), (None, False, model.ln_final, "ln_final")]
    if model.cfg.d_mlp is not None:
        norms.append((1, True, model.blocks[1].ln2, "blocks.1.ln2"))
    for layer, mlp_input, norm, name in norms:
        stack = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        expected = cache[f"{name}.hook_normalized"] - getattr(norm, "bias", 0.0)
        assert distance(stack.sum(0), expected) <= EXACT
        full = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True)
        assert distance(full.sum(0), expected) <= EXACT
        onto = torch.randn(12, 3, dtype=torch.float64)
        projected = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True, project_output_onto=onto)
        assert distance(projected, full @ onto) <= EXACT
        flat = cache.get_full_resid_decomposition(layer, mlp_input, project_output_onto=onto[:, 0])
        plain = cache.get_full_resid_decomposition(layer, mlp_input)
        assert distance(flat, plain @ onto[:, 0]) <= EXACT
    stack = cache.accumulated_resid(apply_ln=True)
    assert distance(stack[-1], cache["ln_final.hook_normalized"]) <= EXACT


@over_stacks
def test_neurons(layer_types):
    model, _, cache = run_of(layer_types)
    if model.cfg.d_mlp is None:
        with pytest.raises(ValueError, match="mixers alone: there are no neurons"):
            cache.stack_neuron_results(-1)
        return
    stack, labels = cache.stack_neuron_results(-1, return_labels=True)
    assert labels[:2] == ["L0N0", "L0N1"] and len(labels) == len(stack) == 16 * model.cfg.n_layers
    assert distance(stack[16:32].sum(0), cache["mlp_out", 1]) <= EXACT
    some, labels = cache.stack_neuron_results(2, -1, [3, 7], return_labels=True, incl_remainder=True)
    assert labels == ["L0N3", "L0N7", "L1N3", "L1N7", "remainder"]
    assert torch.equal(some[:4], stack[[3, 7, 19, 23]][:, :, -1])
    assert distance(some.sum(0), cache["resid_post", 1][:, -1]) <= EXACT


@over_stacks
def test_logit_lens(layer_types):
    model, logits, cache = run_of(layer_types)
    seen, labels = cache.layer_logits(return_labels=True)
    assert labels == [*(f"{layer}_pre" for layer in range(model.cfg.n_layers)), "final_post"]
    assert distance(seen[-1], logits) <= EXACT
    assert distance(seen[1], model.ln_final(cache["resid_post", 0]) @ model.W_U) <= EXACT
    middle = cache.layer_logits(incl_mid=True, pos_slice=-1)
    assert middle.shape[0] == model.cfg.n_layers * (1 if model.cfg.d_mlp is None else 2) + 1
    assert distance(middle[-1], logits[:, -1]) <= EXACT


@over_stacks
def test_a_row_of_a_cache(layer_types):
    """Cutting rows keeps the state and the edits that single writes and states are worked out from."""
    model, _, _ = run_of(layer_types)
    tokens = tokens_of(model, 3, 6, seed=2)
    _, state = model(tokens[:, :3], return_state=True)
    value = torch.arange(5, dtype=torch.float64)
    options = {"state": state, "edits": [WriteEdit(0, 1, 4, "add", key=value[:3] - 1, value=value)]}
    logits, cache = model.run_with_cache(tokens[:, 3:], **options)
    for rows, kept in ((1, [1]), ([2, 0], [2, 0]), ((1, 3), [1, 2]), (torch.tensor([1]), [1]), (None, [0, 1, 2])):
        part = cache.apply_slice_to_batch_dim(rows)
        assert type(part) is type(cache) and part.has_batch_dim == (rows != 1 or isinstance(rows, torch.Tensor))
        assert torch.equal(part.write(0, 1, 1).AB, cache.write(0, 1, 1).AB[kept])
        assert distance(part.state(0, 1, 2), cache.state(0, 1, 2)[kept]) <= EXACT
        found, _ = part.logit_contributions(3, unit="head")
        expected = logits[kept, :, 3] if part.has_batch_dim else logits[1, :, 3]
        assert distance(found.sum(0), expected) <= EXACT
    assert cache["resid_post", 0].shape[0] == 3
    with pytest.raises(ValueError, match="one sequence without a batch axis, so it has no rows"):
        cache.apply_slice_to_batch_dim(1).apply_slice_to_batch_dim(0)
    one = cache.apply_slice_to_batch_dim([1]).remove_batch_dim()
    assert one["z", 0].ndim == 3 and torch.equal(one.write(0, 1, 1).AB, cache.write(0, 1, 1).AB[[1]])
    moved = cache.to("meta")
    assert moved is cache and moved["resid_pre", 0].is_meta and moved.write(0, 1, 1).A.is_meta
    assert moved.initial_state.layers[0].matrix.is_meta and all(
        more.query.is_meta for more in moved.added_writes.values()
    )


def test_other_methods():
    model, _, cache = run_of()
    assert cache.stack_activation("mixer_out").shape == (3, 3, 5, 12)
    assert cache.stack_activation("write_key", 1).shape == (1, 3, 5, 4, 3)
    with pytest.raises(ValueError, match=r"'z' has shapes \(3, 5, 4, 5\) and \(3, 5, 4, 6\), which do not stack"):
        cache.stack_activation("z")
    was = torch.is_grad_enabled()
    cache.toggle_autodiff(mode=was)
    assert torch.is_grad_enabled() == was
    stacked, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert stacked.shape[0] == len(labels) == 7 and torch.equal(stacked[3], cache["blocks.1.hook_resid_mid"])
    assert len(cache) == len(list(cache)) == len(cache.keys())


def test_attributions_of_any_stack():
    """By transformer_lens's own order of arguments, and for rows cut on the way."""
    model, logits, cache = run_of()
    stack = cache.decompose_resid(pos_slice=-1)
    assert distance(cache.logit_attrs(stack, 3, 5, -1).sum(0), logits[:, -1, 3] - logits[:, -1, 5]) <= EXACT
    row = cache.logit_attrs(stack, tokens=3, pos_slice=-1, batch_slice=1)
    assert row.shape == (7,) and distance(row.sum(), logits[1, -1, 3]) <= EXACT


BAD_CALLS = {
    "layer": (
        lambda cache: cache.decompose_resid(4),
        IndexError,
        "layer 4 is out of range: the model has layers 0 to 2",
    ),
    "mode": (lambda cache: cache.decompose_resid(mode="mixer"), ValueError, "mode must be 'all', 'mlp' or 'attn'"),
    "unit": (lambda cache: cache.logit_contributions(1, unit="layer"), ValueError, "unit must be one of .*got 'layer'"),
    "token": (lambda cache: cache.logit_contributions(29), IndexError, "tokens must be 0 to 28, got 29 to 29"),
    "last": (lambda cache: cache.decompose_resid(None, True), ValueError, "mlp_input needs the layer whose MLP reads"),
    "shapes": (
        lambda cache: cache.logit_contributions(1, torch.tensor([1, 2, 3])),
        ValueError,
        r"must have the same shape, got \(\) and \(3,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, kind, words = BAD_CALLS[case]
    with pytest.raises(kind, match=words):
        call(run_of()[2])


def test_no_mlp_reads_anything_where_there_is_none():
    with pytest.raises(ValueError, match="what an MLP reads, but this model's blocks have none"):
        run_of(MAMBA)[2].decompose_resid(1, mlp_input=True)
