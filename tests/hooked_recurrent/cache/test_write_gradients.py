"""The gradient with respect to every write: equal to autograd's and to finite differences, at the cost of factors."""

from functools import lru_cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hooked_recurrent import StateEdit, WriteEdit, reads_only
from hooked_recurrent.scan.adjoint import adjoint_factors, write_effects, write_gradients
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.models import (
    ALL_LINEAR,
    HYBRID,
    RULES,
    distance,
    over_stacks,
    random_factors,
    tiny_model,
    tokens_of,
)

pytestmark = pytest.mark.shapes_on_one_rule

EXACT = 1e-9
ALL = slice(None)


@lru_cache
def model_of(layer_types=ALL_LINEAR):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


def metric(logits):
    """One number that all positions but the last two enter, unlike at each."""
    weight = torch.linspace(-1, 2, logits[:, :-2, :7].numel(), dtype=logits.dtype).view(logits[:, :-2, :7].shape)
    return (weight * logits[:, :-2, :7].sin()).sum()


def started(model, start, length=14):
    """Tokens and, from a state, the state that six others left."""
    tokens = tokens_of(model, length=length)
    if start == "fresh":
        return tokens, {}
    return tokens[:, 6:], {"state": model(tokens[:, :6], return_state=True)[1]}


def with_gradients(model, tokens, **options):
    return model.run_with_cache(tokens, incl_bwd=True, **{"metric": metric, **options})[1]


over_starts = pytest.mark.parametrize("start", ["fresh", "from a state"])


@over_starts
@pytest.mark.parametrize("edited", [False, True], ids=["native", "edited"])
@over_stacks
def test_write_grad_is_the_gradient_of_the_write_matrix(layer_types, start, edited):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    last = model.cfg.recurrent_layers[-1]
    if edited:
        key, value = torch.ones(3, dtype=torch.float64), torch.linspace(-2, 1, 5, dtype=torch.float64)
        options["edits"] = [
            WriteEdit(0, 1, 8, "add", key=key, value=value),
            WriteEdit(last, 1, 9, "replace", key=key, value=value),
            WriteEdit(last, 2, slice(7, 11), "delete", form="net"),
        ]
    names = [f"blocks.{layer}.mixer.hook_write" for layer in model.cfg.recurrent_layers]
    cache, matrices = (
        with_gradients(model, tokens, **options),
        with_gradients(model, tokens, names_filter=names, **options),
    )
    for layer, name in zip(model.cfg.recurrent_layers, names, strict=True):
        expected = matrices[f"{name}_grad"]
        assert expected.abs().max() > 1e-3
        whole = cache.write_grad(layer, ALL, ALL)
        assert whole.shape == expected.shape and distance(whole, expected) <= EXACT
        for head, pos in [(2, 3), (-1, -3), (slice(1, 3), 4), (0, slice(1, 7, 2)), (slice(2, 0, -1), slice(5, 2, -1))]:
            at, of = ([*range(n)][i] if isinstance(i, slice) else i for i, n in ((pos, tokens.shape[1]), (head, 4)))
            part = expected[:, at][..., of, :, :]
            mine = cache.write_grad(layer, head, pos)
            assert mine.shape == part.shape and distance(mine, part) <= EXACT
        assert cache.write_grad(layer, 0, slice(3, 3)).shape == (2, 0, 3, 5)


@over_starts
@pytest.mark.parametrize("rule", RULES)
def test_write_grad_is_what_an_added_write_does(rule, start):
    """Central differences of fourth order, with an `add` edit of one entry."""
    model = model_of((rule, rule))
    tokens, options = started(model, start)
    cache = with_gradients(model, tokens, **options)
    for layer, head, position, i, j in [(0, 1, 7, 2, 4), (0, 3, 10, 0, 1), (1, 0, 8, 1, 3), (1, 2, 11, 2, 0)]:
        measured = 0.0
        for amount, weight in ((1e-4, 8), (-1e-4, -8), (2e-4, -1), (-2e-4, 1)):
            key, value = torch.eye(3, dtype=torch.float64)[i], amount * torch.eye(5, dtype=torch.float64)[j]
            edit = WriteEdit(layer, head, position, "add", key=key, value=value, batch=1)
            measured += weight * metric(model(tokens, edits=[edit], **options)) / 12e-4
        gradient = cache.write_grad(layer, head, position - cache.positions[0])[1, i, j]
        assert abs(gradient - measured) <= 1e-7 * max(1.0, abs(measured))


@over_starts
@over_stacks
def test_write_effect_is_the_product_with_the_gradient(layer_types, start):
    model = model_of(layer_types)
    tokens, options = started(model, start)
    cache = with_gradients(model, tokens, **options)
    generator = torch.Generator().manual_seed(0)
    length = tokens.shape[1]
    for lead in [(), (4,), (length, 1), (2, 1, 4), (2, length, 4)]:
        key, value = (torch.randn(*lead, width, generator=generator, dtype=torch.float64) for width in (3, 5))
        for layer in model.cfg.recurrent_layers:
            expected = torch.einsum("...k,...kv,...v->...", key, cache.write_grad(layer, ALL, ALL), value)
            effect = cache.write_effect(layer, key, value)
            assert effect.shape == (2, length, 4) and distance(effect, expected) <= EXACT
    some = cache.write_effect(0, key[:, :, [3, 1]], value[:, :, [3, 1]], heads=[3, 1])
    whole = cache.write_effect(0, key, value)
    assert distance(some, whole[:, :, [3, 1]]) <= EXACT
    assert distance(cache.write_effect(0, key[:, :, 2:3], value[:, :, 2:3], heads=2), whole[:, :, 2:3]) <= EXACT


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_does_not_depend_on_what_is_written(rule):
    """With the reads' gradients held, other write keys and values leave it as it is; another decay or query does not."""
    model = model_of((rule, rule))
    tokens, _ = started(model, "fresh")
    cache = with_gradients(model, tokens)
    before = cache.write_grad(1, ALL, ALL)
    prefix = "blocks.1.mixer.hook_"
    for role in ("write_key", "write_value"):
        cache.cache_dict[prefix + role] = torch.randn_like(cache[prefix + role])
        assert torch.equal(cache.write_grad(1, ALL, ALL), before)
    roles = ["log_decay", "query", "read_grad", *(["erase", "probe"] if model.blocks[1].mixer.erases else [])]
    if rule == "delta_net":
        roles.remove("log_decay")  # it has none: zero times a half is zero
    for role in roles:
        kept = cache.cache_dict[prefix + role]
        cache.cache_dict[prefix + role] = 0.5 * kept
        assert distance(cache.write_grad(1, ALL, ALL), before) > 1e-3, role
        cache.cache_dict[prefix + role] = kept


@pytest.mark.parametrize("form", [{"erase": "tied"}, {"erase": "decoupled"}, {}, {"terms": 2}], ids=str)
@pytest.mark.parametrize("vector_decay", [False, True])
def test_adjoint_equals_autograd_of_the_step_reference(form, vector_decay):
    factors = random_factors(40, vector_decay=vector_decay, **form)
    read_grad = torch.randn(2, 40, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    writes = factors.write_matrix().requires_grad_()
    read, _ = step_scan(factors, writes=writes)
    (expected,) = torch.autograd.grad((read * read_grad).sum(), writes)
    found = write_gradients(factors, read_grad, [39, 3, 20, 3])
    assert sorted(found) == [3, 20, 39]
    for position, gradient in found.items():
        assert distance(gradient, expected[:, position]) <= EXACT
    key, value = torch.randn(2, 40, 2, 3, dtype=torch.float64), torch.randn(2, 40, 2, 5, dtype=torch.float64)
    product = torch.einsum("bphk,bphkv,bphv->bph", key, expected, value)
    assert distance(write_effects(factors, read_grad, key, value), product) <= EXACT
    states = []
    step_scan(adjoint_factors(factors, read_grad), on_state=lambda state, index: (states.append(state), state)[1])
    assert distance(torch.cat(states, dim=1).flip(1), expected) <= EXACT


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation made, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("rule", RULES)
def test_no_matrix_per_position_is_made(rule):
    model = tiny_model((rule, rule), seed=1, d_k=40, d_v=40).requires_grad_(False)
    tokens = tokens_of(model, batch=1, length=128)
    matrices = 128 * 4 * 40 * 40
    with Largest() as made:
        cache = with_gradients(model, tokens)
        cache.write_effect(0, torch.ones(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64))
        cache.write_grad(1, 2, 5)
    assert made.numel < matrices / 2
    with Largest() as made:
        model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_write")
    assert made.numel >= matrices


@pytest.mark.parametrize("rule", RULES)
def test_the_named_filter_is_enough_and_what_lacks_is_named(rule):
    model = model_of((rule, rule))
    tokens, _ = started(model, "fresh")
    key, value = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    _, plain = model.run_with_cache(tokens)
    with pytest.raises(
        KeyError, match=r"lacks blocks.1.mixer.hook_read_grad: .*incl_bwd=True, names_filter=\["
    ) as caught:
        plain.write_grad(1, 0, 0)
    names = caught.value.args[0].split("names_filter=[")[1].split("]")[0].replace("'", "").split(", ")
    poor = with_gradients(model, tokens, names_filter=names[1:])
    with pytest.raises(KeyError, match="lacks blocks.1.mixer.hook_log_decay: "):
        poor.write_effect(1, key, value)
    cache = with_gradients(model, tokens, names_filter=names)
    assert distance(cache.write_grad(1, ALL, ALL), with_gradients(model, tokens).write_grad(1, ALL, ALL)) <= EXACT


def test_what_the_factors_cannot_tell_is_refused():
    model = model_of()
    tokens, _ = started(model, "fresh")
    for hook, words in (("hook_state", "changed states"), ("hook_read", "changed reads")):
        name = f"blocks.1.mixer.{hook}"
        with model.hooks(fwd_hooks=[(name, lambda tensor, hook: 2 * tensor)]):
            cache = with_gradients(model, tokens)
        with pytest.raises(ValueError, match=f"{name} may have {words}.*reads_only"):
            cache.write_grad(1, 0, 0)
        cache.write_grad(0, 0, 0)
        with model.hooks(fwd_hooks=[(name, reads_only(lambda tensor, hook: None))]):
            cache = with_gradients(model, tokens)
        cache.write_grad(1, 0, 0)


def test_a_layer_with_replaced_write_matrices_still_has_gradients():
    model = model_of()
    tokens, _ = started(model, "fresh")
    name = "blocks.0.mixer.hook_write"
    with model.hooks(fwd_hooks=[(name, lambda write, hook: write * 1.5)]):
        cache = with_gradients(model, tokens, names_filter=lambda name: not name.endswith("hook_state"))
    assert distance(cache.write_grad(0, ALL, ALL), cache[f"{name}_grad"]) <= EXACT


def test_bad_input(as_users_run):
    model = model_of(HYBRID)
    tokens, _ = started(model, "fresh")
    cache = with_gradients(model, tokens)
    key, value = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layer 1 has no matrix memory; the recurrent ones are \(0, 2\)"):
        cache.write_grad(1, 0, 0)
    with pytest.raises(IndexError, match="head 4 is out of range"):
        cache.write_grad(0, 4, 0)
    with pytest.raises(IndexError, match="position 14 is out of range"):
        cache.write_grad(0, 0, 14)
    with pytest.raises(ValueError, match=r"key has shape \(5,\).*\(2, 14, 4, 3\)"):
        cache.write_effect(0, value, value)
    with pytest.raises(ValueError, match=r"value has shape \(3, 5\).*\(2, 14, 4, 5\)"):
        cache.write_effect(0, key, value.expand(3, 5))
    with pytest.raises(IndexError, match="head 7 is out of range"):
        cache.write_effect(0, key, value, heads=7)


def test_without_a_batch_axis_and_on_kept_positions():
    model = model_of()
    tokens = tokens_of(model, batch=1, length=14)
    whole = with_gradients(model, tokens)
    flat = with_gradients(model, tokens, remove_batch_dim=True)
    assert torch.equal(flat.write_grad(1, 2, 3), whole.write_grad(1, 2, 3))
    late = with_gradients(model, tokens, positions=slice(5, None), heads=[1, 3])
    assert distance(late.write_grad(1, 3, slice(6, 9)), whole.write_grad(1, 3, slice(6, 9))) <= EXACT
    key, value = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    effect = whole.write_effect(1, key, value)
    assert distance(late.write_effect(1, key, value), effect[:, 5:, [1, 3]]) <= EXACT
    assert distance(late.write_effect(1, key, value, heads=3), effect[:, 5:, 3:]) <= EXACT
    with pytest.raises(IndexError, match="head 2 is not in the cache, which kept heads 1, 3"):
        late.write_effect(1, key, value, heads=2)
    early = with_gradients(model, tokens, positions=slice(0, 9))
    with pytest.raises(ValueError, match=r"write at position 4 takes all later positions.*positions=slice\(4, None\)"):
        early.write_grad(1, 0, 4)
    with pytest.raises(ValueError, match=r"write at position 0 takes all later positions"):
        early.write_effect(1, key, value)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_is_made_up_where_an_edit_changed_states(rule):
    """What it leaves of a state is not in the factors; what it adds changes no gradient, nor does what came before."""
    model = model_of((rule, rule))
    tokens, name = tokens_of(model), "blocks.0.mixer.hook_write"
    matrix = torch.ones(3, 5, dtype=torch.float64)
    edits = [StateEdit(0, 1, 5, "scale", scale=0.5), StateEdit(0, 2, 6, "add", matrix=matrix)]
    cache, kept = (with_gradients(model, tokens, edits=edits, **o) for o in ({}, {"names_filter": name}))
    gradient = kept[f"{name}_grad"]
    for pos in (5, 2, slice(3, 8)):
        with pytest.raises(ValueError, match=r"StateEdit.*changed states.*names_filter='blocks.0.mixer.hook_write'"):
            cache.write_grad(0, 1, pos)
    with pytest.raises(ValueError, match="StateEdit.*changed states"):
        cache.write_effect(0, matrix[:, 0], matrix[0])
    assert distance(cache.write_grad(0, 1, slice(6, None)), gradient[:, 6:, 1]) <= EXACT
    assert distance(cache.write_grad(0, [0, 2, 3], ALL), gradient[:, :, [0, 2, 3]]) <= EXACT
    assert cache.write_effect(0, matrix[:, 0], matrix[0], heads=[0, 2]).shape == (2, 12, 2)
