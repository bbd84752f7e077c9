"""The models that ship with the package: where they are, and what is known of them without loading them."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open


def bundled_models() -> dict[str, Path]:
    """Name -> folder (transformers' layout, tokenizer and card included) of every model beside this file."""
    here = Path(__file__).parent
    return {file.parent.name: file.parent for file in sorted(here.glob("*/model.safetensors"))}


def describe_models() -> list[dict[str, Any]]:
    """A row per bundled model, read from its folder without loading any weights."""
    rows = []
    for name, folder in bundled_models().items():
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        evaluation = folder / "evaluation.json"
        measured = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        rows.append(
            {
                "name": name,
                "family": config["model_type"],
                "layers": config["num_hidden_layers"],
                "d_model": config["hidden_size"],
                "heads": config["linear_num_value_heads"],
                "d_k": config["linear_key_head_dim"],
                "d_v": config["linear_value_head_dim"],
                "parameters": sum(math.prod(shape) for shape in sizes.values()),
                "bits_per_byte": measured.get("bits_per_byte"),
            }
        )
    return rows
