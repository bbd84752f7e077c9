"""A tiny random model with a random dictionary of one of its cells, in float64."""

import torch

from tests.hooked_recurrent.models import ALL_LINEAR, tiny_model, tokens_of
from writesae import WriteSAE, WriteSAEConfig

LAYER, HEAD = 1, 2


def cell(layer_types=ALL_LINEAR, layer=LAYER, passages=3, length=24, **sae):
    """(model, sae, tokens); the dictionary is calibrated on the cell's own writes but not trained."""
    model = tiny_model(layer_types)
    tokens = tokens_of(model, batch=passages, length=length)
    names = [f"blocks.{layer}.mixer.hook_write_{side}" for side in ("key", "value")]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    torch.manual_seed(1)
    dictionary = WriteSAE(WriteSAEConfig(d_k=3, d_v=5, n_atoms=12, k=4, **sae)).double()
    dictionary.calibrate_(*(cache[name][:, :, HEAD].flatten(0, 1) for name in names))
    return model, dictionary, tokens
