"""What cannot be looked at is refused with one clear error, alike by everything in the room."""

import re

import pytest
import torch

from hooked_recurrent.memory import effective_attention, half_life, retention, spectrum
from tests.hooked_recurrent.memory.runs import LAYER, cache_of, model_of
from tests.hooked_recurrent.models import HYBRID, RULES, random_factors, random_state, tiny_model, tokens_of

FOLLOWS = [effective_attention, retention, spectrum]
over_looks = pytest.mark.parametrize("look", [*FOLLOWS, half_life])
over_follows = pytest.mark.parametrize("look", FOLLOWS)


@over_looks
def test_layers_without_a_memory(look):
    model = tiny_model(HYBRID, seed=1).requires_grad_(False)
    _, cache = model.run_with_cache(tokens_of(model, length=4))
    for layer in (1, 7, -1):
        with pytest.raises(ValueError, match=rf"layer {layer} has no matrix memory; the recurrent ones are \(0, 2\)"):
            look(cache, layer)
    with pytest.raises(ValueError, match=r"several layers, so say which; the recurrent ones are \(0, 2\)"):
        look(cache)
    with pytest.raises(ValueError, match="factors are of one layer already: layer 2"):
        look(cache.factors(0), 2)


@over_looks
def test_heads_out_of_range(look):
    cache = cache_of("gated_delta_net", length=4)
    for source, layer in ((cache, LAYER), (cache.factors(LAYER), None)):
        for head in (4, -5, [0, 4]):
            with pytest.raises(IndexError, match=r"head (4|-5) is out of range: there are 4"):
                look(source, layer, head)
        with pytest.raises(ValueError, match="no head is asked for"):
            look(source, layer, slice(4, 9))
        with pytest.raises(ValueError, match="no head is asked for"):
            look(source, layer, [])


@pytest.mark.parametrize("look", [retention, spectrum])
def test_positions_out_of_range(look):
    cache = cache_of("gated_delta_net", length=4)
    for position in (4, -5, torch.tensor([1, 4])):
        with pytest.raises(IndexError, match=r"position (4|-5) is out of range: there are 4"):
            look(cache, LAYER, positions=position)


@pytest.mark.parametrize("rule", RULES)
@over_looks
def test_roles_that_were_not_kept_are_named_with_the_filter_that_keeps_them(look, rule):
    model = model_of(rule)
    tokens = tokens_of(model, length=4)
    _, poor = model.run_with_cache(tokens, names_filter=f"blocks.{LAYER}.mixer.hook_query")
    with pytest.raises(KeyError, match=rf"lacks blocks.{LAYER}.mixer.hook_log_decay.*names_filter=\[") as caught:
        look(poor, LAYER)
    message = caught.value.args[0]
    lacking = message.split(":")[0]
    assert "hook_query" not in lacking
    assert ("hook_erase" in lacking) == (model.blocks[LAYER].mixer.erases and look is not half_life)
    names = re.findall(r"'([^']+)'", message)
    _, enough = model.run_with_cache(tokens, names_filter=names)
    look(enough, LAYER)


@over_follows
def test_no_memory_is_made_up_where_a_function_changed_the_matrices(look):
    model = model_of("gated_delta_net")
    tokens = tokens_of(model, length=4)
    for matrix, words in (("hook_state", "changed states"), ("hook_write", "replaced writes by matrices")):
        name = f"blocks.{LAYER}.mixer.{matrix}"
        with model.hooks(fwd_hooks=[(name, lambda tensor, hook: 2 * tensor)]):
            _, cache = model.run_with_cache(tokens)
        with pytest.raises(ValueError, match=f"{name} {words}"):
            look(cache, LAYER)
        look(cache, 0)


@pytest.mark.parametrize("look", [effective_attention, spectrum])
def test_a_cache_knows_its_own_initial_state(look):
    cache = cache_of("mamba2", length=4)
    with pytest.raises(ValueError, match="a cache knows the state that its run started from"):
        look(cache, LAYER, initial_state=random_state(random_factors(4, heads=4)))
