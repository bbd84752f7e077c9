"""The other names of a hook: those by which transformer_lens's tools ask for it, and what to say of a name that is none.

    blocks.{l}.hook_attn_out   is blocks.{l}.hook_mixer_out, in every layer
    blocks.{l}.attn.hook_x     is blocks.{l}.mixer.hook_x where the layer is recurrent: q, k, v, z, result
    blocks.{l}.hook_x          is blocks.{l}.mixer.hook_x: write_key, write_value, log_decay, ...
    blocks.{l}.hook_part.hook_x is blocks.{l}.part.hook_x, for any part of a block

So `patching.get_act_patch_attn_head_out_by_pos` patches hook_z of every layer, `cache["z", 3]` reads it, and
`generic_activation_patch(..., activation_name="write_key")` patches the memory's own roles. To transformer_lens "query" is
short for q, so hook_query goes by the last form: `activation_name="mixer.hook_query"`. A hook is always shown by its first
name: `hook.name`, the keys of a cache.
"""

import re
from collections.abc import Container, Iterable
from difflib import get_close_matches

PATTERNS = ("pattern", "attn_scores", "rot_q", "rot_k", "q_input", "k_input", "v_input")


def first_name(name: str, known: Container[str]) -> str | None:
    """The name in `known` that `name` stands for; None if there is none."""
    if name in known:
        return name
    within = re.fullmatch(r"(blocks\.\d+)\.hook_(\w+\.hook_\w+)", name)
    if within is not None:  # what get_act_name makes of ("mixer.hook_query", layer)
        return first_name(".".join(within.groups()), known)
    parts = re.fullmatch(r"(blocks\.\d+)\.(?:attn\.)?hook_(\w+)", name)
    if parts is None:
        return None
    block, word = parts.groups()
    other = f"{block}.hook_mixer_out" if word == "attn_out" else f"{block}.mixer.hook_{word}"
    return other if other in known else None


def unknown_hook(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is no hook of a model whose hooks are `names`."""
    listed = list(names)
    parts = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)", name)
    hint = ""
    if parts is not None:
        layer, word = parts.groups()
        if f"blocks.{layer}.mixer.hook_query" in listed and word in PATTERNS:
            hint = (
                f": layer {layer} is recurrent and attends to nothing; see hooked_recurrent.memory.effective_attention"
            )
        elif f"blocks.{layer}.hook_resid_pre" in listed and word in ("resid_mid", "mlp_out"):
            hint = f": layer {layer} has no MLP; hook_resid_post follows its mixer"
    if not hint:
        short = [one for one in listed if one.endswith(f".hook_{name.removeprefix('hook_')}")]  # a name without its place
        near = short[:1] or get_close_matches(name, listed, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; model.hook_dict lists them all"
    return f"no hook {name!r}{hint}"
