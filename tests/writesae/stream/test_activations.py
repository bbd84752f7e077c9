"""Writes streamed from a tiny random model: the right factors, every one of them, in a seeded random order."""

from collections import Counter
from itertools import islice

import pytest
import torch

from tests.hooked_recurrent.models import HYBRID, over_stacks, tiny_model, tokens_of
from writesae.stream.activations import WriteStream, check_head, collect_writes, layer_of_hook

HOOK = "blocks.2.mixer.hook_write"


def stream_of(tokens=None, hook=HOOK, head=1, **options):
    model = tiny_model(HYBRID)
    tokens = tokens_of(model, batch=7, length=11) if tokens is None else tokens
    options = {"batch_size": 10, "passages_per_forward": 3, "dtype": torch.float64, **options}
    return WriteStream(model, tokens, hook, head, **options)


def rows(key):
    """Writes as hashable rows, to be counted; the last digits depend on what else was in the forward pass."""
    return Counter(map(name_of, key))


def name_of(row):
    return tuple(round(number, 8) for number in row.tolist())


@over_stacks
@pytest.mark.parametrize("head", [0, 3])
def test_the_factors_are_those_of_the_matrix_hook(layer_types, head):
    model = tiny_model(layer_types)
    tokens = tokens_of(model)
    hook = f"blocks.{model.cfg.n_layers - 1}.mixer.hook_write"
    key, value = collect_writes(model, tokens, hook, head)
    _, cache = model.run_with_cache(tokens, names_filter=[hook])
    torch.testing.assert_close(
        torch.einsum("bpk,bpv->bpkv", key, value), cache[hook][:, :, head], rtol=1e-12, atol=1e-12
    )
    assert not key.requires_grad


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("skip", [0, 3])
def test_an_epoch_holds_every_write_as_often_as_it_occurs(cache_bytes, skip):
    stream = stream_of(cache_bytes=cache_bytes, skip_positions=skip, buffer_writes=35)
    assert stream.cached == bool(cache_bytes)
    key, value = collect_writes(stream.model, stream.tokens, HOOK, 1)
    every = rows(torch.cat([key, value], dim=-1)[:, skip:].flatten(0, 1))
    assert sum(every.values()) == stream.n_writes == 7 * (11 - skip)
    batches = list(islice(stream, 60))
    assert all(len(key) == len(value) == 10 for key, value in batches)
    seen = rows(torch.cat([torch.cat(batch, dim=-1) for batch in batches]))
    assert set(seen) == set(every)
    if cache_bytes:  # whole batches of one epoch: nothing twice
        epoch = rows(torch.cat([torch.cat(batch, dim=-1) for batch in batches[: stream.n_writes // 10]]))
        assert all(count <= every[row] for row, count in epoch.items())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_batches_mix_passages_and_follow_from_the_seed(cache_bytes):
    options = {"cache_bytes": cache_bytes, "buffer_writes": 50}
    first, again, other = (list(islice(stream_of(seed=seed, **options), 5)) for seed in (0, 0, 1))
    for (key, value), (same_key, same_value) in zip(first, again, strict=True):
        assert torch.equal(key, same_key) and torch.equal(value, same_value)
    assert not torch.equal(first[0][0], other[0][0])
    stream = stream_of(**options)
    key, _ = collect_writes(stream.model, stream.tokens, HOOK, 1)
    home = {name_of(row): passage for passage in range(7) for row in key[passage]}
    assert all(len({home[name_of(row)] for row in batch}) >= 3 for batch, _ in first)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_a_sample_is_made_of_the_streams_own_writes(cache_bytes):
    stream = stream_of(cache_bytes=cache_bytes)
    key, value = stream.sample(25)
    assert len(key) == len(value) == 25
    assert rows(key) <= rows(collect_writes(stream.model, stream.tokens, HOOK, 1)[0].flatten(0, 1))
    assert len(stream.sample(10_000)[0]) == stream.n_writes


def test_all_writes_are_computed_once_and_progress_is_told():
    stream, told = stream_of(), []
    key, _ = stream.all_writes(lambda done, total: told.append((done, total)))
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert stream.all_writes(lambda done, total: told.append("again"))[0] is key and told[-1] == (7, 7)


def test_fewer_writes_than_a_batch_are_one_batch():
    stream = stream_of(batch_size=10_000)
    assert len(next(iter(stream))[0]) == stream.n_writes


def test_batches_are_float32_unless_asked_otherwise():
    assert next(iter(stream_of(dtype=torch.float32)))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("hook", "word"),
    [
        ("blocks.1.mixer.hook_write", r"layer 1 has no writes; the recurrent layers of this model are \[0, 2\]"),
        ("blocks.7.mixer.hook_write", "layer 7 has no writes"),
        ("blocks.2.mixer.hook_state", r"trained on blocks.\{layer\}.mixer.hook_write, not on"),
        ("blocks.2.mixer.hook_write_key", "not on 'blocks.2.mixer.hook_write_key'"),
        ("blocks.2.mixer.hook_writ", "did you mean 'blocks.2.mixer.hook_write'"),
        ("", "this model has no hook ''"),
    ],
)
def test_a_hook_that_will_not_do_is_a_clear_error(hook, word):
    with pytest.raises(ValueError, match=word):
        layer_of_hook(tiny_model(HYBRID), hook)


@pytest.mark.parametrize("head", [-1, 4])
def test_a_head_that_is_not_there_is_a_clear_error(head):
    with pytest.raises(ValueError, match=f"head must be 0..3, got {head}"):
        check_head(tiny_model(HYBRID), head)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1)])
def test_no_tokens_are_a_clear_error(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        stream_of(tokens=torch.zeros(shape, dtype=torch.long))


def test_nan_in_the_writes_names_hook_and_position():
    model = tiny_model(HYBRID)
    tokens = tokens_of(model)

    def spoil(value, hook):
        value[1, 4, 2] = torch.nan
        return value

    def silence(z, hook):
        return torch.zeros_like(z)

    # Nothing above reads what was spoiled, so the model itself, which looks at its logits, has nothing to object to.
    hooks = [("blocks.2.mixer.hook_write_value", spoil), ("blocks.2.mixer.hook_z", silence)]
    with model.hooks(hooks), pytest.raises(ValueError, match="hook_write_value, head 2, at position 4 of passage 1"):
        collect_writes(model, tokens, HOOK, 2)
