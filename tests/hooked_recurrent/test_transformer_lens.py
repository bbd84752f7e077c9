"""transformer_lens's own tools run on our models, by the same calls as on its own."""

from functools import partial

import pytest
import torch
from transformer_lens import ActivationCache, FactoredMatrix, patching
from transformer_lens.hook_points import HookPoint

from hooked_recurrent.compat import HookedRootModule
from tests.hooked_recurrent.models import HYBRID, distance, tiny_model, tokens_of


@pytest.fixture(scope="module")
def model():
    return tiny_model(HYBRID, seed=1).requires_grad_(False)


@pytest.fixture(scope="module")
def texts(model):
    """A corrupted text, the clean one's cache, and a metric."""
    corrupted, clean = tokens_of(model, 1, 6, seed=1), tokens_of(model, 1, 6, seed=2)
    return corrupted, model.run_with_cache(clean)[1], lambda logits: logits[0, -1, 3]


def test_kinds(model, texts):
    assert isinstance(model, HookedRootModule)
    assert all(isinstance(point, HookPoint) for point in model.hook_dict.values())
    assert isinstance(texts[1], ActivationCache) and isinstance(texts[1].write(0, 0, 0), FactoredMatrix)


def test_protocol(model):
    protocol = pytest.importorskip(
        "transformer_lens.model_protocol", reason="transformer_lens 3.9 has no protocols yet"
    )
    assert isinstance(model, protocol.TransformerLensModel)
    assert isinstance(model, protocol.TrainableTransformerLensModel)


TOOLS = {
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "hook_resid_mid": patching.get_act_patch_resid_mid,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
    "hook_mixer_out": partial(
        patching.generic_activation_patch,
        patch_setter=patching.layer_pos_patch_setter,
        activation_name="mixer_out",
        index_axis_names=("layer", "pos"),
    ),
}


@pytest.mark.parametrize("hook", TOOLS)
def test_patching(model, texts, hook):
    corrupted, cache, metric = texts
    table = TOOLS[hook](model, corrupted, cache, metric)
    values = table if isinstance(table, torch.Tensor) else table.values
    assert values.shape == (3, 6)
    for layer, position in ((0, 0), (1, 3), (2, 5)):

        def patch(tensor, hook, at=position):
            tensor[:, at] = cache[hook.name][:, at]

        logits = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.{hook}", patch)])
        assert distance(values[layer, position].double(), metric(logits)) <= 1e-6  # the table is float32


def test_patching_everything_gives_the_clean_run(model, texts):
    corrupted, cache, metric = texts

    def restore(tensor, hook):
        return cache[hook.name]

    logits = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.hook_resid_pre", restore)])
    expected = cache["ln_final.hook_normalized"] @ model.W_U
    assert distance(logits, expected) <= 1e-12


def test_stacks_of_the_residual_stream(model, texts):
    _, cache, _ = texts
    stacked, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert stacked.shape[0] == len(labels) == 7
    assert torch.equal(stacked[3], cache["blocks.1.hook_resid_mid"])
    assert cache["resid_post", 2].shape == (1, 6, 12)
