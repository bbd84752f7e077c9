"""A random RWKV-7 in RWKV-LM's own file layout, and the two packages that run it: rwkv and rwkv7-hf."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """The sizes of a model; by default those of RWKV-7 0.1B, with a vocabulary that keeps the unembedding out of the time."""

    layers: int = 12
    """Blocks."""
    width: int = 768
    """Residual stream."""
    d_head: int = 64
    """Width of a head."""
    d_mlp: int = 3072
    """Hidden width of the channel mix."""
    vocabulary: int = 1000
    """Tokens."""
    ranks: tuple[tuple[str, int], ...] = (("w", 64), ("a", 64), ("v", 32), ("g", 128))
    """Ranks of the low-rank projections to decay, learning rate, value gate and output gate."""


SMALL = Size(layers=2, width=128, d_head=64, d_mlp=96, vocabulary=101, ranks=(("w", 8), ("a", 8), ("v", 8), ("g", 8)))
"""The sizes of a quick run. At a head width other than 64 rwkv7-hf's converter changes an epsilon, and so the logits."""


def write_file(path: Path, size: Size) -> Path:
    """Save the state dict of a random model. What RWKV-LM starts at zero is random here, as after training."""
    torch.manual_seed(0)
    width, vectors = size.width, torch.linspace(0, 1, size.width)
    tensors = {"emb.weight": matrix(size.vocabulary, width), "head.weight": matrix(size.vocabulary, width)}
    norms = ["ln_out", "blocks.0.ln0", *(f"blocks.{i}.ln{j}" for i in range(size.layers) for j in (1, 2))]
    for norm in norms:
        tensors |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    for layer in range(size.layers):
        mixer, mlp = f"blocks.{layer}.att.", f"blocks.{layer}.ffn."
        for part in "rwkvag":
            tensors[f"{mixer}x_{part}"] = vectors.view(1, 1, -1).clone()
        starts = {
            "w0": 6 * vectors.square() - 5.5,
            "a0": vectors - 0.7,
            "v0": 0.7 - 0.4 * vectors,
            "k_k": 0.7 + 0 * vectors,
        }
        starts["k_a"] = 1 + 0 * vectors
        tensors |= {mixer + name: vector.view(1, 1, -1) for name, vector in starts.items()}
        for part, rank in size.ranks:
            tensors[f"{mixer}{part}1"], tensors[f"{mixer}{part}2"] = matrix(width, rank), 0.3 * matrix(rank, width)
        tensors[f"{mixer}r_k"] = torch.full((width // size.d_head, size.d_head), -0.04)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{mixer}{name}.weight"] = matrix(width, width)
        tensors |= {f"{mixer}ln_x.weight": torch.ones(width), f"{mixer}ln_x.bias": torch.zeros(width)}
        tensors[f"{mlp}x_k"] = vectors.view(1, 1, -1).clone()
        tensors[f"{mlp}key.weight"], tensors[f"{mlp}value.weight"] = (
            matrix(size.d_mlp, width),
            matrix(width, size.d_mlp),
        )
    torch.save(tensors, path)
    return path


def matrix(rows: int, columns: int) -> Tensor:
    """A random matrix whose product with a vector keeps its size."""
    return torch.randn(rows, columns) * columns**-0.5


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Both packages print as they load."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def rwkv_package(file: Path) -> Any:
    """The `rwkv` package's model of a file, TorchScript, float32: `forward(tokens, state, full_output)`."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    with quiet():
        from rwkv.model import RWKV

        return RWKV(str(file.with_suffix("")), "cpu fp32")


def rwkv7_hf(file: Path, folder: Path) -> Callable[[Tensor], Tensor]:
    """rwkv7-hf's model of a file that its own converter has translated: tokens to logits."""
    from rwkv7_hf import NativeRWKV7ForCausalLM, converter

    with quiet():
        converter.main(["--input", str(file), "--output", str(folder), "--precision", "fp32"])
    model = NativeRWKV7ForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits
