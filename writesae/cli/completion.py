"""What a shell may offer for an option: read from the files of the bundled models, without importing torch.

Every function takes what was typed so far and gives (value, help) pairs. Nothing here may raise, or load anything heavy: a
shell waits for it.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LEARNED = ("hook_write", "hook_state", "hook_write_key", "hook_write_value", "hook_read", "hook_query", "hook_z")
"""Hooks of every recurrent layer that dictionaries are usually trained on."""
PRESETS = ("bilinear", "bilinear_flat", "bilinear_gated", "bilinear_jumprelu", "bilinear_tied", "flat", "rank1")
LAYER_COUNTS = ("n_layers", "num_hidden_layers", "n_layer")


def _bundled() -> dict[str, Path]:
    """Name and folder of every bundled model; `find_spec` finds the package and imports nothing of it."""
    spec = find_spec("hooked_recurrent")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for root in roots for file in (Path(root) / "zoo").glob("*/config.json"))
    return {file.parent.name: file.parent for file in files}


def complete_model(incomplete: str) -> list[str]:
    """Bundled models; a folder or a hub name has to be typed."""
    return [name for name in _bundled() if name.startswith(incomplete)]


def complete_hook(ctx: Any, incomplete: str) -> list[str]:
    """Hooks of the model that the line names, where it is bundled."""
    folder = _bundled().get(ctx.params.get("model") or "tiny-gated-deltanet")
    if folder is None:
        return []
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = next((config[name] for name in LAYER_COUNTS if name in config), 0)
    names = [f"blocks.{layer}.mixer.{hook}" for layer in range(layers) for hook in LEARNED]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
    return [name for name in names if name.startswith(incomplete)]


def complete_preset(incomplete: str) -> list[str]:
    """The paper's variants."""
    return [name for name in PRESETS if name.startswith(incomplete)]
