"""A small tokenizer and a small model, made once: the zoo's code is the same for them as for the shipped ones."""

import pytest
import torch

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.mixers.gated_delta_net import GatedDeltaNetConfig
from hooked_recurrent.model import HookedRecurrentModel
from hooked_recurrent.zoo.corpus import SourceFile, standard_library
from hooked_recurrent.zoo.tokenizer import train_tokenizer

SMALL_VOCAB = 400


@pytest.fixture(scope="session")
def few_files() -> list[SourceFile]:
    """A few thousand tokens of the library."""
    return [file for file in standard_library("train") if file.name.startswith("json/")]


@pytest.fixture(scope="session")
def small_tokenizer(few_files):
    """400 pieces learned on the json package."""
    return train_tokenizer((file.text for file in few_files), SMALL_VOCAB)


@pytest.fixture
def small_config() -> ModelConfig:
    """Two layers, d_k != d_v, grouped keys."""
    mixer = GatedDeltaNetConfig(n_heads=2, n_key_heads=1, d_k=16, d_v=24)
    return ModelConfig(
        d_model=32, d_vocab=SMALL_VOCAB, d_mlp=48, layer_types=("gated_delta_net",) * 2, mixer=mixer, model_name="small"
    )


@pytest.fixture
def small_model(small_config, small_tokenizer) -> HookedRecurrentModel:
    """Random weights from a fixed seed."""
    torch.manual_seed(1)
    return HookedRecurrentModel(small_config, small_tokenizer)
