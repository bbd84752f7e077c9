"""Sources: what each is in a model, the right numbers read off one forward pass, clear refusals."""

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, RULES, over_stacks, tiny_model, tokens_of
from writesae.sae.states import state_samples
from writesae.stream.sources import Described, Source, collect, describe, expand, joined

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
rules = pytest.mark.parametrize("rule", RULES)


def hook(layer, name):
    return f"blocks.{layer}.mixer.{name}"


@over_stacks
def test_additive_writes_are_the_factors_of_the_matrix_hook(layer_types):
    model = tiny_model(layer_types)
    tokens, layer = tokens_of(model), model.cfg.n_layers - 1
    source = Source(hook(layer, "hook_write"), 3)
    record = collect(model, tokens, [source])[source]
    _, cache = model.run_with_cache(tokens, names_filter=[source.hook])
    matrices = torch.einsum("bpk,bpv->bpkv", record["key"], record["value"])
    torch.testing.assert_close(matrices, cache[source.hook][:, :, 3], **TIGHT)
    assert not record["key"].requires_grad


@rules
def test_net_writes_and_states_follow_the_recurrence(rule):
    model = tiny_model((rule, rule))
    tokens = tokens_of(model)
    net, state = Source(hook(1, "hook_write"), 2, "net"), Source(hook(1, "hook_state"), 2)
    records = collect(model, tokens, [net, state])
    _, cache = model.run_with_cache(tokens, names_filter=[state.hook])
    states = cache[state.hook][:, :, 2]
    decay = records[state]["log_decay"].exp()
    decay = decay[..., None] if decay.ndim == 2 else decay
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
    for record in records.values():
        added = torch.einsum("bptk,bptv->bpkv", record["key"], record["value"])
        torch.testing.assert_close(decay[..., None] * before + added, states, **TIGHT)
    by_channel = rule in ("rwkv7", "gated_linear_attention", "kimi_delta_attention")
    assert describe(model, state).vector_decay == by_channel == ("squared_norm" not in records[state])
    if not by_channel:
        torch.testing.assert_close(records[state]["squared_norm"], states.square().sum((-1, -2)), **TIGHT)


def test_vectors_of_any_hook():
    model = tiny_model(HYBRID)
    tokens = tokens_of(model)
    names = ["hook_embed", "blocks.1.hook_resid_post", hook(2, "hook_write_value"), hook(0, "hook_beta")]
    sources = [Source(names[0]), Source(names[1]), Source(names[2], 1), Source(names[3])]
    records = collect(model, tokens, sources)
    _, cache = model.run_with_cache(tokens, names_filter=names)
    for source in sources:
        x = cache[source.hook] if source.head is None else cache[source.hook][:, :, source.head]
        assert torch.equal(records[source]["x"], x)
        assert describe(model, source).d_k == x.shape[-1] and describe(model, source).d_v == 1
    assert describe(model, sources[2]) == Described("vector", 2, 5, 1)


def test_one_forward_pass_serves_all_sources_and_stops_where_none_is_left(monkeypatch):
    model = tiny_model(HYBRID)
    sources = [*expand(model, hook(0, "hook_write")), *expand(model, hook(0, "hook_write"), form="net")]
    sources += [
        *expand(model, hook(0, "hook_state")),
        *expand(model, hook(0, "hook_z")),
        Source("blocks.0.hook_resid_pre"),
    ]
    runs, above = [], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **kw: runs.append(1) or forward(*args, **kw))
    with model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: above.append(1))]):
        assert set(collect(model, tokens_of(model), sources)) == set(sources) and len(sources) == 17
        assert len(runs) == 1 and not above
        collect(model, tokens_of(model), [Source("hook_embed")])
        assert len(runs) == 2 and not above
        collect(model, tokens_of(model), [Source("hook_embed"), Source("ln_final.hook_normalized")])
        assert len(runs) == 3 and above


def test_heads_and_layers_are_not_mixed_up():
    model = tiny_model(HYBRID)
    tokens, every = tokens_of(model), []
    for name in ("hook_write", "hook_state"):
        every += expand(model, f"blocks.*.mixer.{name}")
    every += expand(model, "blocks.*.mixer.hook_write", form="net")
    together = collect(model, tokens, every)
    for source in every:
        alone = collect(model, tokens, [source])[source]
        assert set(alone) == set(together[source])
        for name, tensor in alone.items():
            torch.testing.assert_close(together[source][name], tensor, **TIGHT)
    few = collect(model, tokens, [every[1], every[6]])  # heads 1 of layer 0 and 2 of layer 2
    assert all(torch.equal(few[s]["key"], together[s]["key"]) for s in few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_states_that_the_rounded_factors_make(dtype):
    model = tiny_model(HYBRID)
    source = Source(hook(2, "hook_state"), 1)
    record = collect(model, tokens_of(model), [source], dtype=dtype)[source]
    assert record["key"].dtype == record["value"].dtype == dtype
    assert record["log_decay"].dtype == record["squared_norm"].dtype == torch.float64
    wide = {name: tensor.double() for name, tensor in record.items()}
    norms = state_samples(wide).matrices().square().sum((1, 2))
    torch.testing.assert_close(record["squared_norm"].flatten(), norms, **TIGHT)


def test_records_of_different_numbers_of_terms_are_joined():
    one, two = (
        {"key": torch.randn(2, 3, terms, 4), "value": torch.randn(2, 3, terms, 5), "log_decay": torch.randn(2, 3)}
        for terms in (1, 2)
    )
    for parts in ([one, two], [two, one]):
        whole = joined(parts)
        assert whole["key"].shape == (4, 3, 2, 4) and whole["log_decay"].shape == (4, 3)
        apart = [torch.einsum("ptmk,ptmv->ptkv", part["key"], part["value"]) for part in parts]
        torch.testing.assert_close(torch.einsum("ptmk,ptmv->ptkv", whole["key"], whole["value"]), torch.cat(apart))


def test_a_pattern_stands_for_all_layers_and_heads():
    model = tiny_model(HYBRID)
    found = expand(model, "blocks.*.mixer.hook_write")
    assert [(s.hook, s.head) for s in found] == [(hook(layer, "hook_write"), h) for layer in (0, 2) for h in range(4)]
    assert expand(model, "blocks.*.mixer.hook_write", [1], form="net")[1] == Source(hook(2, "hook_write"), 1, "net")
    assert expand(model, "blocks.*.hook_resid_post")[2] == Source("blocks.2.hook_resid_post")
    with pytest.raises(ValueError, match="no hook 'blocks.\\*.mixer.hook_writ'; did you mean"):
        expand(model, "blocks.*.mixer.hook_writ")
    with pytest.raises(ValueError, match="head must be 0..3, got 9"):
        expand(model, "blocks.*.mixer.hook_write", [9])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (
            Source("blocks.1.mixer.hook_write", 0),
            r"layer 1 has no writes; the recurrent layers of this model are \[0, 2\]",
        ),
        (Source("blocks.7.mixer.hook_write", 0), "layer 7 has no writes"),
        (Source("blocks.2.mixer.hook_writ", 0), "did you mean 'blocks.2.mixer.hook_write'"),
        (Source("", 0), "this model has no hook ''"),
        (Source("blocks.2.mixer.hook_write", -1), "head must be 0..3, got -1"),
        (Source("blocks.2.mixer.hook_write", 4), "head must be 0..3, got 4"),
        (Source("blocks.2.mixer.hook_write"), "has 4 heads: say which head, 0..3"),
        (Source("blocks.2.mixer.hook_write_key"), "has 4 heads: say which"),
        (Source("blocks.2.hook_resid_post", 0), "has no heads, but head 0"),
        (Source("blocks.2.hook_resid_post", form="net"), "is for hook_write"),
        (Source("blocks.2.mixer.hook_state", 0, "net"), "is for hook_write, not for 'blocks.2.mixer.hook_state'"),
        (Source("blocks.1.attn.hook_pattern", 0), "no vector per token"),
    ],
)
def test_a_source_that_will_not_do_is_a_clear_error(source, word):
    with pytest.raises(ValueError, match=word):
        describe(tiny_model(HYBRID), source)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="did you mean 'additive'"):
        Source("blocks.2.mixer.hook_write", 0, "aditive")


def test_nan_names_hook_head_and_position():
    model = tiny_model(HYBRID)

    def spoil(value, hook):
        value[1, 4, 2] = torch.nan
        return value

    def silence(z, hook):
        return torch.zeros_like(z)

    # Nothing above reads what was spoiled, so the model itself, which looks at what comes out, has nothing to object to.
    with (
        model.hooks([("blocks.2.mixer.hook_write_value", spoil), ("blocks.2.mixer.hook_z", silence)]),
        pytest.raises(ValueError, match="hook_write_value, head 2, at position 4 of passage 1"),
    ):
        collect(model, tokens_of(model), [Source(hook(2, "hook_write"), 2)])
