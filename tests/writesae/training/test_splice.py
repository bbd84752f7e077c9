"""Spliced losses: the two ends are known, a write's are those of a WriteEdit, states feed back, vectors go by their hook."""

import math

import pytest
import torch

from hooked_recurrent import WriteEdit
from tests.hooked_recurrent.models import tiny_model, tokens_of
from writesae import Codes, Source, WriteSAE, WriteSAEConfig
from writesae.stream import collect
from writesae.training.splice import Spliced, loss_recovered

HOOKS = {
    "hook_write": ("blocks.0.mixer.hook_write", 1, (3, 5)),
    "hook_state": ("blocks.1.mixer.hook_state", 2, (3, 5)),
    "head of a vector hook": ("blocks.0.mixer.hook_z", 3, (5, 1)),
    "vector hook": ("blocks.0.hook_mixer_out", None, (12, 1)),
}


class Scaling(WriteSAE):
    """A dictionary that rebuilds everything, times a factor."""

    def __init__(self, widths, factor):
        super().__init__(WriteSAEConfig(*widths, n_atoms=4, k=1))
        self.factor = factor

    def forward(self, x):
        assert x.shape[-2:] == (self.config.d_k, self.config.d_v)
        return self.factor * x


class Rebuilding(Scaling):
    """The same by encoding and decoding, which pass the matrices on in the codes' values."""

    def encode_samples(self, samples):
        x = samples.matrices().flatten(1)
        return Codes(torch.arange(x.shape[1]).expand(x.shape), x)

    def decode(self, codes):
        return self.factor * codes.values.unflatten(1, (self.config.d_k, self.config.d_v))


@pytest.mark.parametrize("name", HOOKS)
def test_the_two_ends_and_what_lies_between(name):
    hook, head, widths = HOOKS[name]
    model, source = tiny_model(), Source(hook, head)
    tokens = tokens_of(model, batch=3, length=10)
    perfect, empty, half = (loss_recovered(model, Scaling(widths, f), source, tokens) for f in (1.0, 0.0, 0.5))
    assert perfect.loss_spliced == pytest.approx(perfect.loss_native, rel=1e-12)
    assert perfect.loss_recovered == pytest.approx(1.0) and empty.loss_recovered == 0.0
    assert empty.loss_spliced == empty.loss_zeroed != empty.loss_native
    assert half.loss_spliced not in (half.loss_native, half.loss_zeroed)
    assert perfect.loss_native == pytest.approx(model(tokens, return_type="loss").item(), rel=1e-12)


def test_states_that_blow_up_have_an_infinite_loss_and_no_share():
    model, tokens = tiny_model(), tokens_of(tiny_model(), batch=1, length=10)
    found = loss_recovered(model, Scaling((3, 5), 1e60), Source(HOOKS["hook_state"][0], 2), tokens)
    assert found.loss_spliced == math.inf and math.isfinite(found.loss_zeroed)
    assert set(found.to_dict()) == {"loss_native", "loss_zeroed"}


def test_a_write_at_half_strength_is_a_scaled_write():
    model, tokens = tiny_model(), tokens_of(tiny_model(), batch=1, length=10)
    found = loss_recovered(model, Scaling((3, 5), 0.5), Source(HOOKS["hook_write"][0], 1), tokens)
    for op, loss in (("delete", found.loss_zeroed), ("scale", found.loss_spliced)):
        edit = WriteEdit(0, 1, slice(0, 10), op, **({"scale": 0.5} if op == "scale" else {}))
        assert loss == pytest.approx(model(tokens, return_type="loss", edits=[edit]).item(), rel=1e-10)


@pytest.mark.parametrize("rule", ["gated_delta_net", "rwkv7"])
def test_a_net_write_takes_its_erase_with_it(rule):
    """Without the net writes of the native run nothing of them is left: only what feeds back from the changed states."""
    model, head = tiny_model((rule, rule)), 1
    tokens, source = tokens_of(model, batch=1, length=10), Source(HOOKS["hook_write"][0], head, "net")
    perfect = loss_recovered(model, Rebuilding((3, 5), 1.0), source, tokens)
    assert perfect.loss_spliced == pytest.approx(perfect.loss_native, rel=1e-6) != perfect.loss_zeroed
    record = collect(model, tokens, [source])[source]
    net = record["key"].mT @ record["value"]

    def less(write, hook):
        write = write.clone()
        write[:, :, head] -= net
        return write

    hooked = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(source.hook, less)])
    assert perfect.loss_zeroed == pytest.approx(hooked.item(), rel=1e-12)
    half = loss_recovered(model, Rebuilding((3, 5), 0.5), source, tokens)
    assert half.loss_spliced not in (half.loss_native, half.loss_zeroed)


def test_rebuilt_states_feed_back():
    """Halving every state as it is made leaves less than half of the older ones."""
    model, tokens = tiny_model(), tokens_of(tiny_model(), batch=1, length=10)
    found = loss_recovered(model, Scaling((3, 5), 0.5), Source(HOOKS["hook_state"][0], 2), tokens)

    def halved(state, hook):
        state = state.clone()
        state[:, :, 2] *= 0.5
        return state

    hooked = model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(HOOKS["hook_state"][0], halved)])
    assert found.loss_spliced == pytest.approx(hooked.item(), rel=1e-12)


def test_few_or_many_passages_at_a_time(monkeypatch):
    model, source = tiny_model(), Source(HOOKS["hook_write"][0], 1)
    tokens = tokens_of(model, batch=5, length=10)
    found = []
    for limit in (1, 2 * 4 * 10 * 4 * 15, 1 << 28):  # one passage, two, all
        monkeypatch.setattr("writesae.training.splice._BYTES_AT_ONCE", limit)
        found.append(list(loss_recovered(model, Scaling((3, 5), 0.5), source, tokens).to_dict().values()))
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0] == pytest.approx(found[2], rel=1e-9)


def test_a_real_dictionary_and_no_passages():
    model = tiny_model()
    sae = WriteSAE(WriteSAEConfig(3, 5, n_atoms=8, k=2))
    source = Source(HOOKS["hook_write"][0], 1)
    found = loss_recovered(model, sae, source, tokens_of(model, batch=2, length=10))
    assert all(math.isfinite(value) for value in found.to_dict().values()) and "loss_recovered" in found.to_dict()
    with pytest.raises(ValueError, match="at least one passage"):
        loss_recovered(model, sae, source, tokens_of(model)[:0])


def test_where_nothing_can_be_recovered():
    nothing = Spliced(2.0, 2.5, 2.0)
    assert math.isnan(nothing.loss_recovered) and "loss_recovered" not in nothing.to_dict()
    assert Spliced(2.0, 2.5, 3.0).loss_recovered == 0.5 and Spliced(2.0, 4.0, 3.0).loss_recovered == -1.0
