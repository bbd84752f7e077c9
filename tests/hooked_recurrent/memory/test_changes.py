"""Net writes against the states of the step scan, for every rule."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hooked_recurrent import Factors, WriteEdit
from hooked_recurrent.memory import changes
from hooked_recurrent.scan.step import step_scan
from tests.hooked_recurrent.memory.runs import EXACT, LAYER, cache_of, model_of, runs, vectors
from tests.hooked_recurrent.models import RULES, distance, random_factors, random_state, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

TERMS = {rule: 2 if rule == "rwkv7" else 1 for rule in RULES}
"""Of native runs: RWKV-7 alone removes along another key than it writes."""
forms = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "erase": st.sampled_from(["none", "tied", "decoupled"]),
        "vector_decay": st.booleans(),
        "strong": st.booleans(),
        "full_beta": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


def states_of(factors, initial_state=None):
    """S_0 or zero, and every state behind it [batch, 1 + pos, head, d_k, d_v], one step after the other."""
    states = [(factors.zero_state() if initial_state is None else initial_state)[:, None]]
    if len(states[0]) < len(factors.query):
        states[0] = states[0].expand(len(factors.query), -1, -1, -1, -1)
    step_scan(factors, initial_state, on_state=lambda state, index: (states.append(state), state)[1])
    return torch.cat(states, dim=1)


def decayed(log_decay, before):
    decay = log_decay.exp()
    return (decay[..., None] if decay.ndim == 4 else decay[..., None, None]) * before


def check(result, states, exact=EXACT):
    """Every step of the definition: S_t = diag(d_t) S_{t-1} + sum of the terms."""
    net = torch.einsum("bphmk,bphmv->bphkv", result.key, result.value)
    assert distance(decayed(result.log_decay, states[:, :-1]) + net, states[:, 1:]) <= exact
    assert distance(result.squared_size(), net.square().sum((-1, -2))) <= exact
    if result.log_decay.ndim == 3:
        norms = result.squared_norms()
        expected = states[:, 1:].double().square().sum((-1, -2))
        assert norms.dtype == torch.float64 and norms.shape == expected.shape
        assert distance(norms, expected) <= exact
    else:
        with pytest.raises(ValueError, match="every key channel decays at its own rate"):
            result.squared_norms()


@given(forms, st.booleans())
def test_bare_factors(values, with_state):
    factors = random_factors(**values)
    state = random_state(factors) if with_state else None
    result = changes(factors, initial_state=state)
    check(result, states_of(factors, state))
    assert result.key.shape[3] == (2 if values["erase"] == "decoupled" else 1)


@pytest.mark.parametrize("erase", ["none", "decoupled"])
def test_several_writes_at_a_position(erase):
    factors = random_factors(9, erase=erase, terms=3)
    state = random_state(factors)
    check(changes(factors, initial_state=state), states_of(factors, state))
    if erase == "decoupled":  # along the first of several writes
        factors = replace(factors, erase=-0.3 * factors.write_key[:, :, :, 0])
        result = changes(factors, initial_state=state)
        check(result, states_of(factors, state))
        assert result.key.shape[3] == 3


@pytest.mark.parametrize("rule", RULES)
@given(runs)
def test_runs_of_models(rule, values):
    """Fresh and continued, native and edited: a cache's own initial state takes part."""
    cache = cache_of(rule, **values)
    result = changes(cache, LAYER)
    before = cache.initial_state
    state = None if before is None else before.layers[LAYER].matrix
    check(result, states_of(cache.factors(LAYER), state))
    if not values["edits"]:
        assert result.key.shape[3] == TERMS[rule]


@pytest.mark.parametrize("rule", RULES)
def test_an_edited_write_leaves_the_erase_as_a_term_of_its_own(rule):
    cache = cache_of(rule, edits=[WriteEdit(LAYER, 1, 4, "replace", **vectors(3))])
    result = changes(cache, LAYER)
    check(result, states_of(cache.factors(LAYER)))
    assert result.key.shape[3] == (2 if cache.factors(LAYER).erases else 1)
    others = changes(cache, LAYER, [0, 3])
    assert others.heads == (0, 3) and others.key.shape[3] == TERMS[rule]
    both = [torch.einsum("bphmk,bphmv->bphkv", of.key, of.value) for of in (result, others)]
    assert distance(both[1], both[0][:, :, [0, 3]]) <= EXACT


def test_one_initial_state_serves_every_row():
    factors = random_factors(6, erase="tied")
    state = random_state(factors)[:1]
    check(changes(factors, initial_state=state), states_of(factors, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    """In the state's dtype, and an erase that was rounded after it was made is still known to lie along the key."""
    tied = random_factors(30, erase="tied", dtype=dtype)
    result = changes(tied)
    assert result.value.dtype == torch.float32
    check(result, states_of(tied), 1e-5)
    assert changes(tied.decoupled()).key.shape[3] == 1
    exact = states_of(tied.map(torch.Tensor.double).decoupled())
    net = result.factors().map(torch.Tensor.double)
    assert distance(states_of(net), exact) <= 1e-4
    # norms belong to these net writes, and are exact however long the memory: float64 throughout
    assert distance(result.squared_norms(), states_of(net)[:, 1:].square().sum((-1, -2))) <= 1e-12


def test_an_erase_beside_the_write_key_by_more_than_rounding_is_a_term_of_its_own():
    factors = random_factors(6, erase="tied").decoupled()
    for size, terms in ((1e-16, 1), (1e-12, 2)):
        erase = factors.erase.clone()
        erase[1, 3, 0] += size * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        assert changes(replace(factors, erase=erase)).key.shape[3] == terms


def test_nothing_left_of_the_state():
    """A decay of exactly 0 (log -inf) forgets, and spoils no norm."""
    factors = random_factors(8)
    factors.log_decay[:, 3] = -torch.inf
    result = changes(factors)
    expected = states_of(factors)[:, 1:].square().sum((-1, -2))
    assert distance(result.squared_norms(), expected) <= EXACT


def test_by_hand():
    """A full delta step on the same key replaces 2 by 5: the net write is 3."""
    key = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    value = torch.tensor([2.0, 5.0], dtype=torch.float64).view(1, 2, 1, 1)
    zero = torch.zeros(1, 2, 1, dtype=torch.float64)
    result = changes(Factors(zero, key, value, key, erase_strength=zero - 1))
    assert result.value.flatten().tolist() == [2.0, 3.0]
    assert result.squared_norms().flatten().tolist() == [4.0, 25.0]
    table = result.to_dataframe()
    assert list(table) == ["batch", "pos", "head", "size"] and table["size"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("rule", RULES)
def test_taking_the_net_write_away_is_a_net_delete_and_beta_0(rule):
    """Invariant 5: S_t without its net write is what the run without it has, and what beta_t = 0 makes."""
    head, position = 2, 4
    model, cache = model_of(rule), cache_of(rule)
    result = changes(cache, LAYER)
    factors = cache.factors(LAYER)
    net = torch.einsum("bmk,bmv->bkv", result.key[:, position, head], result.value[:, position, head])
    left = states_of(factors)[:, position + 1, head] - net
    edited = cache_of(rule, edits=[WriteEdit(LAYER, head, position, "delete", form="net")])
    assert distance(edited.state(LAYER, head, position), left) <= EXACT
    hook = f"blocks.{LAYER}.mixer.hook_beta"
    if hook not in model.hook_dict:
        return

    def silence(beta, hook):
        beta = beta.clone()
        beta[:, position, head] = 0.0
        return beta

    with model.hooks(fwd_hooks=[(hook, silence)]):
        logits, silent = model.run_with_cache(tokens_of(model, length=9))
    assert distance(silent.state(LAYER, head, position), left) <= EXACT
    edit = WriteEdit(LAYER, head, position, "delete", form="net")
    assert distance(model.run_with_hooks(tokens_of(model, length=9), edits=[edit]), logits) <= EXACT


def test_gradients_reach_the_factors():
    factors = random_factors(5, erase="tied")
    key = factors.write_key.clone().requires_grad_()

    def through(result):
        return (result.value.sin() * result.key[..., :1]).sum() + result.squared_norms().sum()

    (made,) = torch.autograd.grad(through(changes(replace(factors, write_key=key))), key)
    step = 1e-6 * torch.randn(factors.write_key.shape, dtype=torch.float64)
    sides = [through(changes(replace(factors, write_key=factors.write_key + way * step))) for way in (1, -1)]
    assert abs((made * step).sum() - (sides[0] - sides[1]) / 2) <= 1e-7 * abs(sides[0] - sides[1])


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize(("erase", "vector_decay"), [("tied", False), ("none", False), ("decoupled", True)])
def test_no_matrix_per_position_is_made(erase, vector_decay):
    factors = random_factors(256, batch=1, heads=1, d_k=48, d_v=48, erase=erase, vector_decay=vector_decay)
    with Largest() as made:
        result = changes(factors, initial_state=random_state(factors))
        if not vector_decay:
            result.squared_norms()
    assert made.numel < 256 * 48 * 48 / 8
