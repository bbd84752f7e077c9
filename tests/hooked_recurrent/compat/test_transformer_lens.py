"""transformer_lens's activation patching runs on every model, by the same calls and names as on its own."""

from functools import lru_cache

import pandas as pd
import pytest
import torch
from transformer_lens import ActivationCache, FactoredMatrix, patching
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import get_act_name

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.compat import HookedRootModule
from tests.hooked_recurrent.models import HYBRID, distance, over_stacks, tiny_model, tokens_of

pytestmark = pytest.mark.shapes_on_one_rule

MAMBA = ("mamba2", "mamba2")


@lru_cache
def model_of(layer_types=HYBRID):
    return tiny_model(layer_types, seed=1).requires_grad_(False)


@lru_cache
def texts_of(layer_types=HYBRID):
    """A corrupted text, the clean one's cache, and a metric."""
    model = model_of(layer_types)
    corrupted, clean = tokens_of(model, 1, 4, seed=1), tokens_of(model, 1, 4, seed=2)
    return corrupted, model.run_with_cache(clean)[1], lambda logits: logits[0, -1, 3]


def sweep(name, setter, *axes):
    """A patching function for any activation, as transformer_lens makes its own."""

    def run(model, corrupted, cache, metric, **options):
        where = {} if "index_df" in options else {"index_axis_names": axes}
        return patching.generic_activation_patch(
            model, corrupted, cache, metric, patch_setter=setter, activation_name=name, **where, **options
        )

    return run


def table_of(result):
    return result if isinstance(result, torch.Tensor) else result.values


def patched(layer_types, hook, index):
    """The metric after patching one place by hand; `index` picks among [batch, pos, head]."""
    corrupted, cache, metric = texts_of(layer_types)

    def patch(tensor, hook):
        tensor[index] = cache[hook.name][index]

    return metric(model_of(layer_types).run_with_hooks(corrupted, fwd_hooks=[(hook, patch)]))


def test_kinds():
    _, cache, _ = texts_of()
    assert isinstance(model_of(), HookedRootModule)
    assert all(isinstance(point, HookPoint) for point in model_of().hook_dict.values())
    assert isinstance(cache, ActivationCache) and isinstance(cache.write(0, 0, 0), FactoredMatrix)


def test_protocol():
    protocol = pytest.importorskip(
        "transformer_lens.model_protocol", reason="transformer_lens 3.9 has no protocols yet"
    )
    assert isinstance(model_of(), protocol.TransformerLensModel)
    assert isinstance(model_of(), protocol.TransformerLensModelWithWeights)
    assert isinstance(model_of(), protocol.TrainableTransformerLensModel)


BY_POSITION = {
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "hook_resid_mid": patching.get_act_patch_resid_mid,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
    "hook_attn_out": patching.get_act_patch_attn_out,
    "hook_mixer_out": sweep("mixer_out", patching.layer_pos_patch_setter, "layer", "pos"),
    "hook_resid_post": sweep("resid_post", patching.layer_pos_patch_setter, "layer", "pos"),
}
WITHOUT_MLP = ("hook_resid_mid", "hook_mlp_out")


@over_stacks
@pytest.mark.parametrize("hook", BY_POSITION)
def test_patching_by_position(layer_types, hook):
    if layer_types == MAMBA and hook in WITHOUT_MLP:
        pytest.skip("no MLP")
    model = model_of(layer_types)
    values = table_of(BY_POSITION[hook](model, *texts_of(layer_types)))
    assert values.shape == (model.cfg.n_layers, 4)
    for layer, position in ((0, 0), (1, 2), (model.cfg.n_layers - 1, 3)):
        expected = patched(layer_types, f"blocks.{layer}.{hook}", (slice(None), position))
        assert distance(values[layer, position].double(), expected) <= 1e-6  # the table is float32


def role(name):
    return sweep(name, patching.layer_head_vector_patch_setter, "layer", "head")


BY_HEAD = {
    "z": patching.get_act_patch_attn_head_out_all_pos,
    "q": patching.get_act_patch_attn_head_q_all_pos,
    "k": patching.get_act_patch_attn_head_k_all_pos,
    "v": patching.get_act_patch_attn_head_v_all_pos,
    **{name: role(name) for name in ("write_key", "write_value", "mixer.hook_query", "log_decay", "read")},
}


def heads_at(layer_types, name):
    """Per layer, how many heads an activation has; 0 where the layer has no such hook."""
    _, cache, _ = texts_of(layer_types)
    known = model_of(layer_types).hook_dict
    name = name.removeprefix("mixer.hook_")
    places = [[f"blocks.{layer}.{part}.hook_{name}" for part in ("mixer", "attn")] for layer in range(len(layer_types))]
    hooks = [next((hook for hook in pair if hook in known), None) for pair in places]
    return [0 if hook is None else cache[hook].shape[2] for hook in hooks]


@over_stacks
@pytest.mark.parametrize("name", BY_HEAD)
def test_patching_by_head(layer_types, name):
    """Every head of every layer; where layers differ in heads, the table of places is given."""
    model, heads = model_of(layer_types), heads_at(layer_types, name)
    places = pd.DataFrame([(layer, head) for layer, count in enumerate(heads) for head in range(count)])
    if set(heads) == {model.cfg.n_heads}:
        values = table_of(BY_HEAD[name](model, *texts_of(layer_types))).flatten()
    else:
        found = sweep(name, patching.layer_head_vector_patch_setter)(model, *texts_of(layer_types), index_df=places)
        values = table_of(found).flatten()
    assert len(values) == len(places) > 0
    for row in (0, len(places) // 2, len(places) - 1):
        layer, head = places.iloc[row]
        hook = get_act_name(name, int(layer))
        assert distance(values[row].double(), patched(layer_types, hook, (slice(None), slice(None), head))) <= 1e-6


@over_stacks
def test_patching_by_head_and_position(layer_types):
    model = model_of(layer_types)
    values = table_of(patching.get_act_patch_attn_head_out_by_pos(model, *texts_of(layer_types)))
    assert values.shape == (model.cfg.n_layers, 4, 4)
    expected = patched(layer_types, "blocks.1.attn.hook_z", (slice(None), 2, 3))
    assert distance(values[1, 2, 3].double(), expected) <= 1e-6


def test_patterns_exist_in_softmax_layers_only():
    model, (corrupted, cache, metric) = model_of(), texts_of()
    setter = patching.layer_head_pattern_patch_setter
    places = pd.DataFrame([(1, head) for head in range(4)])
    values = table_of(sweep("pattern", setter)(model, corrupted, cache, metric, index_df=places))

    def patch(tensor, hook):
        tensor[:, 2] = cache[hook.name][:, 2]

    logits = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_pattern", patch)])
    assert distance(values[2].double(), metric(logits)) <= 1e-6
    words = (
        "no hook 'blocks.0.attn.hook_pattern': layer 0 is recurrent and attends to nothing; see .*effective_attention"
    )
    for tool in (patching.get_act_patch_attn_head_pattern_all_pos, patching.get_act_patch_attn_head_pattern_by_pos):
        with pytest.raises(KeyError, match=words):
            tool(model, corrupted, cache, metric)


@pytest.mark.parametrize("tool", [patching.get_act_patch_resid_mid, patching.get_act_patch_mlp_out])
def test_blocks_without_mlps_say_so(tool):
    with pytest.raises(
        KeyError, match="no hook 'blocks.0.hook_.*': layer 0 has no MLP; hook_resid_post follows its mixer"
    ):
        tool(model_of(MAMBA), *texts_of(MAMBA))


def test_patching_everything_gives_the_clean_run():
    model, (corrupted, cache, _) = model_of(), texts_of()

    def restore(tensor, hook):
        return cache[hook.name]

    logits = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.hook_resid_pre", restore)])
    expected = cache["ln_final.hook_normalized"] @ model.W_U
    assert distance(logits, expected) <= 1e-12


OTHER_NAMES = {
    "blocks.0.hook_attn_out": "blocks.0.hook_mixer_out",
    "blocks.1.hook_attn_out": "blocks.1.hook_mixer_out",
    "blocks.2.attn.hook_z": "blocks.2.mixer.hook_z",
    "blocks.0.hook_write_key": "blocks.0.mixer.hook_write_key",
    "blocks.1.attn.hook_z": "blocks.1.attn.hook_z",
    "blocks.2.hook_mixer.hook_query": "blocks.2.mixer.hook_query",
    "blocks.1.hook_mlp.hook_post": "blocks.1.mlp.hook_post",
}


@pytest.mark.parametrize("other", OTHER_NAMES)
def test_a_hook_answers_to_its_other_name(other):
    model, (corrupted, cache, _) = model_of(), texts_of()
    seen = []
    model.run_with_hooks(corrupted, fwd_hooks=[(other, lambda x, hook: seen.append(hook.name))])
    model.add_hook(other, lambda x, hook: seen.append(hook.name))
    model(corrupted)
    model.reset_hooks()
    assert seen == [OTHER_NAMES[other]] * 2
    assert list(model.run_with_cache(corrupted, names_filter=other)[1]) == [OTHER_NAMES[other]]
    assert cache[other] is cache[OTHER_NAMES[other]]


def test_short_names_of_a_cache():
    _, cache, _ = texts_of()
    assert cache["z", 0] is cache["blocks.0.mixer.hook_z"] and cache["z", -2] is cache["blocks.1.attn.hook_z"]
    assert cache["read", 2] is cache["read", 2, "mixer"] is cache["blocks.2.mixer.hook_read"]
    assert cache["mixer.hook_query", 2] is cache["blocks.2.mixer.hook_query"]
    assert cache["query", 2] is cache["blocks.2.mixer.hook_q"]  # transformer_lens's word for q
    assert cache["attn_out", 1] is cache["blocks.1.hook_mixer_out"]
    assert cache["scale"] is cache["ln_final.hook_scale"] and cache["resid_post", -1].shape == (1, 4, 12)


def test_names_that_are_none():
    model, (corrupted, cache, _) = model_of(), texts_of()
    with pytest.raises(KeyError, match="this model has no hook 'blocks.1.hook_write_key'; did you mean"):
        cache["write_key", 1]  # a softmax layer writes nothing
    with pytest.raises(KeyError, match=r"blocks.0.mixer.hook_write is not in the cache: cache.write\(0, head, pos\) makes it"):
        cache["write", 0]
    with pytest.raises(
        KeyError, match="this run has no hook 'blocks.0.attn.hook_rot_q': layer 0 is recurrent"
    ):
        model.run_with_cache(corrupted, names_filter="blocks.0.attn.hook_rot_q")
    with pytest.raises(KeyError, match="this model has no hook 'zzz'; model.hook_dict lists them all"):
        model.add_hook("zzz", print)
    assert not isinstance(HookedRecurrentModel.checked_hook_name(model, lambda name: False), str)
