"""Fine-tuning by KL: the fork is the model's own edited run, its gradient is the right one, and it does what it is for."""

import copy

import pytest
import torch

from hooked_recurrent import WriteEdit
from hooked_recurrent.cache.backward import weights_apart
from tests.hooked_recurrent.models import over_stacks
from tests.writesae.evaluation.cells_for_tests import HEAD, LAYER, cell
from writesae.training.finetune import FinetuneConfig, divergences, finetune, firings_of, substitution_loss

pytestmark = pytest.mark.shapes_on_one_rule

SMALL = {"steps": 30, "rows": 3, "horizon": 3, "steps_per_pass": 8, "first_position": 2, "warmup_steps": 2}


def layer_of(layer_types):
    return max(layer for layer, kind in enumerate(layer_types) if kind != "attention")


@over_stacks
@pytest.mark.parametrize("terms", [1, 3])
def test_a_fork_is_the_edited_run_of_the_whole_text(layer_types, terms):
    layer = layer_of(layer_types)
    model, sae, tokens = cell(layer_types, layer=layer)
    config = FinetuneConfig(**SMALL, terms=terms)
    firings = next(firings_of(model, tokens, layer, HEAD, config))
    with torch.no_grad():
        edits = firings.substituted(sae, terms)
        t, text = firings.position, firings.trunk.text
        whole = model(text, edits=edits)[:, t : t + 4]
        torch.testing.assert_close(firings.logits(edits, 3), whole)
        codes = sae.encode(firings.key, firings.value)
        kept = sum((edit.key[:, 0, :, None] * edit.value[:, 0, None]) for edit in edits)
        codes.values[:, terms:] = 0
        torch.testing.assert_close(kept, sae.decode(codes))
        torch.testing.assert_close(firings.logits([], 3), model(text)[:, t : t + 4])


@pytest.mark.parametrize("loss", ["kl", "share"])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(loss):
    model, sae, tokens = cell()
    config = FinetuneConfig(**SMALL, loss=loss)
    firings = next(firings_of(model, tokens, LAYER, HEAD, config))

    def value():
        return substitution_loss(sae, firings, config)[0]

    with weights_apart(model):
        value().backward()
    checked = 0
    for parameter in (*sae.decoder.parameters(), *sae.encoder.parameters()):
        grad = parameter.grad.flatten()
        at = int(grad.abs().argmax())
        flat, eps = parameter.data.view(-1), 1e-5
        around = []
        for sign in (1, -1):
            flat[at] += sign * eps
            with torch.no_grad():
                around.append(value().item())
            flat[at] -= sign * eps
        assert grad[at].item() == pytest.approx((around[0] - around[1]) / (2 * eps), rel=1e-4)
        checked += 1
    assert checked == 5 and all(weight.grad is None for weight in model.parameters())


def test_the_losses_by_their_definition():
    model, sae, tokens = cell()
    config = FinetuneConfig(**SMALL, loss="share")
    firings = next(firings_of(model, tokens, LAYER, HEAD, config))
    with torch.no_grad():
        native = firings.logits([], 3)
        atom = firings.logits(firings.substituted(sae, 1), 3)
        loss, numbers = substitution_loss(sae, firings, config)
        by_hand, _ = substitution_loss(sae, firings, FinetuneConfig(**SMALL, loss="kl"))
    p, q = atom.softmax(-1), native.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(divergences(atom, native), torch.stack([kl[:, 0], kl[:, 1:].mean(1)], 1))
    assert by_hand.item() == pytest.approx(kl.mean().item())
    assert numbers["kl"] == pytest.approx(kl.mean().item())
    with torch.no_grad():
        t = firings.position
        edit = WriteEdit(LAYER, HEAD, t, "delete")
        gone = divergences(model(firings.trunk.text, edits=[edit])[:, t : t + 4], native)
    found = divergences(atom, native)
    assert loss.item() == pytest.approx(((found + 1e-9) / (found + gone + 2e-9)).mean().item())
    assert numbers["win_rate"] == (found < gone).double().mean()


def test_an_exact_substitute_has_no_share():
    """A dictionary that holds the write itself: A is zero, so is the share, and every firing is won."""
    model, sae, tokens = cell()
    config = FinetuneConfig(**SMALL, loss="share")
    firings = next(firings_of(model, tokens, LAYER, HEAD, config))
    with torch.no_grad():
        sae.encoder.bias.zero_()
        for row, (key, value) in enumerate(zip(firings.key, firings.value, strict=True)):
            sides = key / key.norm(), value / value.norm()
            sae.decoder.key_atoms[row, 0], sae.decoder.value_atoms[row, 0] = sides
            sae.encoder.key_factors[row, 0], sae.encoder.value_factors[row, 0] = 10 * sides[0], 0.1 * sides[1]
        sae.encoder.key_factors[len(firings.key) :] = 0
        loss, numbers = substitution_loss(sae, firings, config)
    assert numbers["kl"] < 1e-15 and loss.item() < 1e-3 and numbers["win_rate"] == 1.0


@torch.no_grad()
def mean_loss(sae, some, config):
    return sum(substitution_loss(sae, firings, config)[0].item() for firings in some) / len(some)


@pytest.mark.parametrize("loss", ["kl", "share"])
def test_it_lowers_what_it_is_asked_to_lower_and_follows_from_the_seed(loss):
    model, sae, tokens = cell(passages=6)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    norms = sae.atom_norms().clone()
    again = copy.deepcopy(sae)
    config = FinetuneConfig(**{**SMALL, "steps": 20}, loss=loss, lr=2e-2, log_every=8, seed=3)
    stream = firings_of(model, tokens, LAYER, HEAD, config)
    some = [next(stream) for _ in range(8)]
    before = mean_loss(sae, some, config)
    told = []
    log = finetune(
        model, sae, tokens, layer=LAYER, head=HEAD, config=config, on_progress=lambda *done: told.append(done)
    )
    assert [line["step"] for line in log] == [7, 15, 19] and told[-1] == (20, 20)
    assert mean_loss(sae, some, config) < 0.98 * before
    torch.testing.assert_close(sae.atom_norms(), norms)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    finetune(model, again, tokens, layer=LAYER, head=HEAD, config=config)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sae.state_dict().items())
    another = FinetuneConfig(**{**SMALL, "steps": 1}, seed=4)
    assert next(firings_of(model, tokens, LAYER, HEAD, another)).position != some[0].position


def test_firings_keep_to_their_positions():
    model, _, tokens = cell(passages=5)
    config = FinetuneConfig(**SMALL)
    stream = firings_of(model, tokens, LAYER, HEAD, config)
    seen = [next(stream) for _ in range(40)]
    places = {firings.position for firings in seen}
    assert min(places) == 2 and max(places) == tokens.shape[1] - 1 - config.horizon
    assert all(len(firings.key) == config.rows for firings in seen)


def test_what_does_not_fit_is_refused():
    model, sae, tokens = cell()
    where = {"layer": LAYER, "head": HEAD}
    with pytest.raises(ValueError, match="passages of at least 13 tokens"):
        finetune(model, sae, tokens[:, :12], **where)
    with pytest.raises(IndexError, match="layer 7 has no writes"):
        finetune(model, sae, tokens, layer=7, head=0)
    with pytest.raises(IndexError, match="head 9 is out of range"):
        finetune(model, sae, tokens, layer=LAYER, head=9)
    with pytest.raises(ValueError, match="atoms are dense"):
        finetune(model, cell(decoder="dense")[1], tokens, **where)
    sae.provenance.update(hook="blocks.1.mixer.hook_state")
    with pytest.raises(ValueError, match="trained on hook_state"):
        finetune(model, sae, tokens, **where)
    with pytest.raises(ValueError, match="did you mean 'share'"):
        FinetuneConfig(loss="shar")
