"""What is known of the bundled models, read from their folders without loading any weights."""

import json
import math
from typing import Any

from safetensors import safe_open

from hooked_recurrent.loading.load import read_config
from hooked_recurrent.zoo.bundled import bundled_models


def describe_models() -> list[dict[str, Any]]:
    """A row per bundled model: name, rule, sizes, parameters, and bits per byte from its own evaluation."""
    rows = []
    for name, folder in bundled_models().items():
        _, cfg = read_config(folder, name)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
        evaluation = folder / "evaluation.json"
        measured = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        rows.append(
            {
                "name": name,
                "rule": cfg.mixer.rule,
                "layers": cfg.n_layers,
                "d_model": cfg.d_model,
                "heads": cfg.n_heads,
                "d_k": cfg.d_k,
                "d_v": cfg.d_v,
                "parameters": parameters,
                "bits_per_byte": measured.get("bits_per_byte"),
            }
        )
    return rows
