"""RWKV-7 in the layout of RWKV-LM (`x070`): one file of tensors, and no config beside it.

Every size is read off a tensor. What no tensor tells is fixed by the architecture: LayerNorms have an epsilon of 1e-5, the
norm of every head 64e-5 whatever its width, the embeddings are not tied.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from hooked_recurrent.config import ModelConfig
from hooked_recurrent.loading.checkpoint import Checkpoint, Entry
from hooked_recurrent.mixers.rwkv7 import RWKV7Config

NORM_EPS = 1e-5
HEAD_NORM_EPS = 64e-5
UNUSED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
"""The first layer mixes in no values of an earlier one; some files have these of it all the same."""
EXPECTED = "expected RWKV-7 in RWKV-LM's layout (x070)"
# The newest name that a version brought, newest version first.
MARKS = ((r"att\.r_k$", 7), (r"att\.time_maa", 6), (r"att\.ln_x\.", 5), (r"att\.time_decay$", 4))


def config_from_tensors(checkpoint: Checkpoint, name: str) -> ModelConfig:
    """Our config from the shapes of an official checkpoint.

    Raises `ValueError` for other versions of RWKV, other checkpoints, and shapes that contradict each other.
    """
    names = checkpoint.names()
    _refuse_others(names, checkpoint.origin)
    d_vocab, d_model = _sizes(checkpoint, "emb.weight")
    n_heads, d_head = _sizes(checkpoint, "blocks.0.att.r_k")
    if n_heads * d_head != d_model:
        raise ValueError(
            f"{checkpoint.origin} has {n_heads} heads of width {d_head} (blocks.0.att.r_k), which do not fill the residual "
            f"stream of width {d_model} (emb.weight)"
        )
    layers = [int(found[1]) for tensor in names if (found := re.match(r"blocks\.(\d+)\.", tensor))]
    n_layers = 1 + max(layers)
    return ModelConfig(
        d_model=d_model,
        d_vocab=d_vocab,
        d_mlp=_sizes(checkpoint, "blocks.0.ffn.key.weight")[0],
        mlp="channel_mix",
        layer_types=(RWKV7Config.rule,) * n_layers,
        mixer=RWKV7Config(
            n_heads=n_heads,
            d_k=d_head,
            d_v=d_head,
            decay_rank=_sizes(checkpoint, "blocks.0.att.w1")[1],
            iclr_rank=_sizes(checkpoint, "blocks.0.att.a1")[1],
            value_rank=_sizes(checkpoint, "blocks.1.att.v1")[1] if n_layers > 1 else 1,  # a single layer has none
            gate_rank=_sizes(checkpoint, "blocks.0.att.g1")[1],
            norm_eps=HEAD_NORM_EPS,
        ),
        norm="layer",
        norm_eps=NORM_EPS,
        embed_norm=True,
        tied_embeddings=False,
        model_name=name,
    )


def _refuse_others(names: list[str], origin: str) -> None:
    version = next((version for mark, version in MARKS if any(re.search(mark, name) for name in names)), None)
    if version == 7 and not any(name.startswith("model.") for name in names):
        return
    if version is not None and version != 7:
        raise ValueError(f"{origin} is an RWKV-{version} checkpoint; {EXPECTED}")
    if any(name.startswith(("model.", "backbone.")) for name in names):
        raise ValueError(
            f"{origin} is in transformers' layout, not RWKV-LM's: give the folder that holds its config.json"
        )
    some = ", ".join(map(repr, names[:3])) or "nothing"
    raise ValueError(f"{origin} is no RWKV checkpoint: it holds {some}{', ...' if len(names) > 3 else ''}; {EXPECTED}")


def _sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    if name not in checkpoint.names():
        raise ValueError(f"the checkpoint {checkpoint.origin} lacks {name!r}; {EXPECTED}")
    shape = checkpoint.shape(name)
    if len(shape) != 2:
        raise ValueError(f"tensor {name!r} of {checkpoint.origin} has shape {shape}; expected a matrix")
    return shape[0], shape[1]


def entries(cfg: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the checkpoint, in reading order."""
    yield Entry("emb.weight", ("embed.weight",))
    yield from _norm_entries("blocks.0.ln0", "ln_embed.")
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        for norm in ("ln1", "ln2"):
            yield from _norm_entries(f"{block}{norm}", f"{block}{norm}.")
        yield from _mixer_entries(layer, f"{block}att.", f"{block}mixer.")
        yield _row(f"{block}ffn.x_k", f"{block}mlp.mix")
        yield Entry(f"{block}ffn.key.weight", (f"{block}mlp.up.weight",))
        yield Entry(f"{block}ffn.value.weight", (f"{block}mlp.down.weight",))
    yield from _norm_entries("ln_out", "ln_final.")
    yield Entry("head.weight", ("unembed.weight",))


def _norm_entries(theirs: str, ours: str) -> Iterator[Entry]:
    for leaf in ("weight", "bias"):
        yield Entry(f"{theirs}.{leaf}", (f"{ours}{leaf}",))


def _mixer_entries(layer: int, theirs: str, ours: str) -> Iterator[Entry]:
    for part in "rwkvag":
        yield _row(f"{theirs}x_{part}", f"{ours}mix_{part}")
    for part, name in (("receptance", "query"), ("key", "key"), ("value", "value"), ("output", "out")):
        yield Entry(f"{theirs}{part}.weight", (f"{ours}{name}.weight",))
    for part, name in (("w", "decay"), ("a", "iclr"), ("v", "value_gate"), ("g", "gate")):
        if part == "v" and layer == 0:
            continue
        yield Entry(f"{theirs}{part}1", (f"{ours}{name}.down.weight",), _transposed, lambda tensor: tensor.T)
        yield Entry(f"{theirs}{part}2", (f"{ours}{name}.up.weight",), _transposed, lambda tensor: tensor.T)
        if part != "g":
            yield _row(f"{theirs}{part}0", f"{ours}{name}.bias")
    yield _row(f"{theirs}k_k", f"{ours}removal")
    yield _row(f"{theirs}k_a", f"{ours}replacement")
    yield Entry(f"{theirs}r_k", (f"{ours}bonus",))
    yield from _norm_entries(f"{theirs}ln_x", f"{ours}norm_")


def _transposed(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.T.contiguous(),)


def _row(theirs: str, ours: str) -> Entry:
    """Vectors are kept as [1, 1, channel], to be broadcast over batch and position."""
    return Entry(theirs, (ours,), lambda row: (row.flatten(),), lambda vector: vector.view(1, 1, -1))
