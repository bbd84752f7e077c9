"""The rest of transformer_lens: its evaluations, and version 4's analysis tools. What cannot apply says so.

`attribution_patch`, direct path patching and `detect_head` ask every layer for attention's own hooks (attn.hook_z by that very
name, q, k and v inputs, patterns), `JacobianLens` and `random_init_bridge` for a TransformerBridge.
"""

from functools import lru_cache

import pytest
import torch
from torch.utils.data import Dataset
from transformer_lens import evals, patching, utilities
from transformer_lens.head_detector import detect_head

from hooked_recurrent import HookedRecurrentModel
from tests.hooked_recurrent.generation.test_generate import Tokenizer
from tests.hooked_recurrent.models import HYBRID, distance, over_stacks, tiny_model, tokens_of

EXACT = 1e-12


@lru_cache
def model_of(layer_types=HYBRID, tied=True):
    return tiny_model(layer_types, seed=1, tied=tied, tokenizer=Tokenizer()).requires_grad_(False)


@lru_cache
def bundled():
    return HookedRecurrentModel.from_pretrained("tiny-gated-deltanet").requires_grad_(False)


def analysis(name):
    """A tool of transformer_lens.tools.analysis, or a skipped test where this version has none of that name."""
    module = pytest.importorskip("transformer_lens.tools.analysis")
    return getattr(module, name, None) or pytest.skip(f"this transformer_lens has no {name}")


def test_a_prompt_is_tested(capsys):
    utilities.test_prompt("Once upon a", " time", bundled(), prepend_bos=False)
    assert "Top 0th token" in capsys.readouterr().out


def test_evaluations():
    assert 0 < float(evals.sanity_check(bundled())) < 20
    assert 0 <= evals.ioi_eval(bundled(), num_samples=2)["Accuracy"] <= 1
    with pytest.raises(IndexError, match="out of range: the vocabulary has"):  # it draws tokens from 100 to 20,000
        evals.induction_loss(bundled(), device="cpu", subseq_len=20)


@over_stacks
@pytest.mark.parametrize("tied", [True, False])
def test_logit_lens(layer_types, tied):
    logit_lens, model = analysis("logit_lens"), model_of(layer_types, tied)
    tokens = tokens_of(model, 2, 5)
    logits, cache = model.run_with_cache(tokens)
    for found in (logit_lens(model, tokens, positions=None), cache.logit_lens(positions=None)):
        assert distance(found.values, cache.layer_logits()) <= EXACT
        assert found.labels == cache.layer_logits(return_labels=True)[1]
    best = logit_lens(model, tokens, top_k=3, return_type="probs")
    assert torch.equal(best.readout.top_ids[-1], logits[:, -1].topk(3).indices)


@over_stacks
@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_direct_logit_attribution(layer_types, unit):
    """Its rows are parts of the logit without the norm's bias (or, by layer, streams of their own)."""
    model = model_of(layer_types)
    tokens = tokens_of(model, 2, 5)
    found = analysis("direct_logit_attribution")(model, tokens, 3, 5, unit=unit)
    logits = model(tokens)[:, -1]
    bias = getattr(model.ln_final, "bias", torch.zeros(12, dtype=torch.float64)) @ (model.W_U[:, 3] - model.W_U[:, 5])
    whole = found.attribution[-1] if unit == "layer" else found.attribution.sum(0)
    assert distance(whole + bias, logits[:, 3] - logits[:, 5]) <= EXACT
    assert len(found.labels) == len(found.attribution) and len(found.top(2)) == 2


def test_interchange_interventions():
    """A full basis moves the whole activation, so the run is the plain patched one."""
    model, hook = model_of(), "blocks.0.hook_mixer_out"
    base, source = tokens_of(model, 3, 5, seed=1), tokens_of(model, 3, 5, seed=2)
    where = torch.tensor([1, 2, 4])

    def last_logits(tokens):
        return model(tokens, last_only=True)[:, 0]

    kept = analysis("collect_activations")(model, hook, source, last_logits, positions=where)
    expected = model.run_with_cache(source)[1][hook][torch.arange(3), where]
    assert torch.equal(kept, expected)
    full = analysis("SubspaceInterchange")(torch.eye(12, dtype=torch.float64))
    moved = analysis("run_with_intervention")(model, hook, full, base, kept, last_logits, positions=where)

    def patch(tensor, hook):
        tensor[torch.arange(3), where] = expected

    assert distance(moved, model.run_with_hooks(base, fwd_hooks=[(hook, patch)])[:, -1]) <= EXACT
    if hasattr(pytest.importorskip("transformer_lens.tools.analysis"), "fit_das"):
        options = {"rank": 2, "epochs": 1, "base_positions": where, "source_positions": where}
        fitted = analysis("fit_das")(model.float(), hook, base, source, [1, 2, 3], last_logits, **options)
        model.double()
        assert fitted.subspace.basis.shape == (12, 2)


def test_gradients_of_any_hooks():
    analysis("attribution_patch")
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    model = tiny_model(seed=1)
    tokens, name = tokens_of(model, 1, 5), "blocks.0.mixer.hook_write_value"
    kept = cache_activation_and_gradient(model, tokens, lambda logits: logits[0, -1, 3], names_filter=name)
    activation = kept.activations[name].requires_grad_()
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: activation)])
    assert distance(kept.gradients[name], torch.autograd.grad(logits[0, -1, 3], activation)[0]) <= EXACT


def test_training():
    training = pytest.importorskip("transformer_lens.tools.training")

    class Texts(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, row):
            return {"tokens": torch.arange(6) + row}

    model = tiny_model(dtype=torch.float32)
    before = model(torch.arange(6), return_type="loss")
    config = training.TrainConfig(num_epochs=4, batch_size=4, device="cpu", print_every=None)
    assert model(torch.arange(6), return_type="loss").isfinite() and training.train(model, config, Texts()) is model
    assert model(torch.arange(6), return_type="loss") < before


def test_what_needs_attention_everywhere_says_so():
    model = model_of()
    tokens = tokens_of(model, 1, 5)
    with pytest.raises(KeyError, match="layer 0 is recurrent and attends to nothing"):
        detect_head(model, "1 2 3 4", "previous_token_head")
    found = detect_head(model, "1 2 3 4", "previous_token_head", heads=[(1, 2)])  # the hybrid's softmax layer
    assert 0 <= found[1, 2] <= 1 and (found[0] == -1).all()
    tool = analysis("attribution_patch")
    with pytest.raises(ValueError, match="requires hook points missing from the cache: blocks.0.attn.hook_z"):
        tool(tiny_model(HYBRID), tokens, tokens_of(model, 1, 5, seed=2), lambda logits: logits[0, -1, 3])


def test_direct_paths_need_attentions_own_inputs():
    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this transformer_lens has it elsewhere, for its own models")
    model = model_of()
    corrupted, clean = tokens_of(model, 1, 5, seed=1), tokens_of(model, 1, 5, seed=2)
    caches = [model.run_with_cache(tokens)[1] for tokens in (clean, corrupted)]
    with pytest.raises(ValueError, match="blocks.0 has no `attn` component"):
        patching.get_act_patch_direct_path(
            model, corrupted, *caches, lambda logits: logits[0, -1, 3], 0, 0, verbose=False
        )
