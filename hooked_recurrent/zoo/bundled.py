"""Where the models that ship with the package are."""

from pathlib import Path


def bundled_models() -> dict[str, Path]:
    """Name -> folder (transformers' layout, tokenizer and card included) of every model beside this file."""
    here = Path(__file__).parent
    return {file.parent.name: file.parent for file in sorted(here.glob("*/model.safetensors"))}
