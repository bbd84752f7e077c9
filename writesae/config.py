"""What a WriteSAE is and how it is trained: frozen dataclasses, a sentence per field, unknown keys refused.

The variant is written down (`encoder`, `decoder`, `activation`) and saved with the weights, so that a loader never has
to guess it from tensor names. A new one adds its name to the tuple here and a class beside the others in `writesae.sae`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from hooked_recurrent.config import StrictConfig, require_positive

ENCODERS = ("bilinear", "tied", "linear")
DECODERS = ("outer_product", "dense")
STARTS = ("random", "samples")
ACTIVATIONS = ("topk", "batch_topk", "jumprelu", "gated", "soft_gated")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16")
LOGS = ("tensorboard", "wandb", "trackio")
"""Where the log may go besides log.jsonl."""
PRESETS = {
    "flat": ("linear", "dense", "topk"),
    "rank1": ("linear", "outer_product", "topk"),
    "bilinear": ("bilinear", "outer_product", "topk"),
    "bilinear_tied": ("tied", "outer_product", "topk"),
    "bilinear_flat": ("bilinear", "dense", "topk"),
    "bilinear_gated": ("bilinear", "outer_product", "soft_gated"),
    "bilinear_jumprelu": ("bilinear", "outer_product", "jumprelu"),
}
"""The paper's variants by the names of its code: (encoder, decoder, activation)."""


def require_one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` with the nearest allowed name when `value` is none of them."""
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{owner}.{name} must be {' or '.join(map(repr, allowed))}, got {value!r}{hint}")


def require_at_least_zero(owner: str, **values: int | float) -> None:
    """Raise `ValueError` naming the first value below zero (or not a number)."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{owner}.{name} must be at least 0, got {value!r}")


@dataclass(frozen=True)
class WriteSAEConfig(StrictConfig):
    """Shape and variant of one dictionary of rank-1 (or rank-r) atoms."""

    d_k: int
    """Width of the key side of the matrices, the side that a query contracts."""
    d_v: int
    """Width of the value side, the side that leaves through W_O."""
    n_atoms: int = 2048
    """Atoms in the dictionary (2,048 in the paper)."""
    k: int = 32
    """Atoms that may be active in one code (32 in the paper); at most n_atoms."""
    rank: int = 1
    """Outer products per atom; 1 is the shape of a native write."""
    center: bool = False
    """Whether a constant mean matrix is stored and added to every reconstruction."""
    encoder: str = "bilinear"
    """"bilinear": z_i = sum_r p_ir^T X r_ir + c_i, factors untied from the decoder's; "tied": the decoder's own factors;
    "linear": z_i = <E_i, X> + c_i with a whole matrix per atom."""
    decoder: str = "outer_product"
    """"outer_product": A_i = sum_r v_ir w_ir^T, kept as factors; "dense": a whole matrix per atom."""
    activation: str = "topk"
    """"topk", "batch_topk" (with a learned threshold for inference), "jumprelu", "gated" (hard gate) or "soft_gated" (the
    paper's); see writesae/sae/activations.py."""
    matryoshka: tuple[int, ...] = ()
    """Prefix sizes, rising: the first m atoms alone must rebuild the input too, for every m listed (Bussmann et al. 2025,
    arXiv:2503.17547). The whole dictionary always counts and need not be listed."""
    sparsity: float = 1e-3
    """Weight of the sparsity penalty of jumprelu (L0), gated (L1 of the gate) and soft_gated; topk and batch_topk have
    none."""
    bandwidth: float = 1e-2
    """Width of jumprelu's straight-through windows at the start, scaled units."""
    init_threshold: float = 1e-2
    """Threshold of every jumprelu atom at the start, scaled units."""
    start: str = "random"
    """What the atoms are at first: "random" outer products, or "samples", those of the leading singular vectors of calibration
    samples. Where one or two atoms are active, most random ones would never win a sample, and stay dead."""
    seed: int = 0
    """Seed of the random initial factors, and of the choice of samples to start from."""

    def __post_init__(self) -> None:
        owner = "WriteSAEConfig"
        require_positive(owner, d_k=self.d_k, d_v=self.d_v, n_atoms=self.n_atoms, k=self.k, rank=self.rank)
        require_positive(owner, bandwidth=self.bandwidth, init_threshold=self.init_threshold)
        require_at_least_zero(owner, sparsity=self.sparsity)
        if self.k > self.n_atoms:
            raise ValueError(f"WriteSAEConfig.k must be at most n_atoms={self.n_atoms}, got {self.k}")
        if self.rank > min(self.d_k, self.d_v):
            limit = min(self.d_k, self.d_v)
            raise ValueError(f"WriteSAEConfig.rank must be at most min(d_k, d_v)={limit}, got {self.rank}")
        require_one_of(owner, "encoder", self.encoder, ENCODERS)
        require_one_of(owner, "decoder", self.decoder, DECODERS)
        require_one_of(owner, "activation", self.activation, ACTIVATIONS)
        require_one_of(owner, "start", self.start, STARTS)
        if self.encoder == "tied" and self.decoder == "dense":
            raise ValueError("WriteSAEConfig.encoder 'tied' reads the decoder's factors, and decoder 'dense' has none")
        sizes = (0, *self.matryoshka, self.n_atoms + 1)
        if any(small >= large for small, large in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(
                f"WriteSAEConfig.matryoshka must be rising sizes in 1..{self.n_atoms}, got {self.matryoshka}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WriteSAEConfig":
        """As every config; JSON's lists become tuples."""
        found: WriteSAEConfig = super().from_dict(values)
        return found

    @classmethod
    def preset(cls, name: str, d_k: int, d_v: int, **fields: Any) -> "WriteSAEConfig":
        """One of the paper's variants (`PRESETS`) at these widths; other fields as given.

        Raises `ValueError` for an unknown preset, with the nearest one.
        """
        require_one_of("WriteSAEConfig", "preset", name, tuple(PRESETS))
        encoder, decoder, activation = PRESETS[name]
        return cls(d_k, d_v, **{"encoder": encoder, "decoder": decoder, "activation": activation, **fields})


@dataclass(frozen=True)
class TrainConfig(StrictConfig):
    """One training run: how long, how fast, what revives dead atoms, and how the writes reach it."""

    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 256
    """Writes per step (256 in the paper)."""
    lr: float = 5e-3
    """Adam's learning rate after the warm-up."""
    lr_min: float = 5e-4
    """Learning rate at the last step of the cosine or of the line."""
    schedule: str = "cosine"
    """How the learning rate falls from lr to lr_min after the warm-up: "cosine", "linear", or "constant", which stays at
    lr."""
    warmup_steps: int = 50
    """Steps of linear warm-up; the first step already has lr / warmup_steps, not zero."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""
    seed: int = 0
    """Seed of the order of the writes and of resampling."""
    project_gradient: bool = False
    """Whether the part of an atom's gradient that only changes its length is removed; the norm constraint undoes it."""
    precision: str = "float32"
    """"bfloat16" narrows the products that score the whole dictionary, and with them the chosen scores; weights, Gram
    matrices, errors, gradients and Adam's moments stay in the dictionary's own type."""
    sparsity_warmup_steps: int = 0
    """Steps over which the penalty of jumprelu, gated and soft_gated rises in a line from 0, so that atoms can form before
    they are pruned."""
    bandwidth_final: float = 1.0
    """jumprelu's window at the last step as a share of the dictionary's `bandwidth`; it narrows geometrically."""
    dead_after: int = 100
    """Steps without firing after which an atom counts as dead (100 in the paper's code)."""
    aux_weight: float = 1.0
    """Weight of the auxiliary loss that only dead atoms feel (paper 1e-2, its code 1.0, Gao et al. 2024 1/32)."""
    aux_k: int = 32
    """Dead atoms that may rebuild one residual (256 in the paper's code); its cost grows with the square, 0 is off."""
    resample_every: int = 250
    """Steps between moves of dead atoms onto badly reconstructed writes; 0 never moves one."""
    resample_until: float = 0.8
    """Share of the run after which no atom is moved any more, so that every atom has time to settle."""
    splice_passages: int = 8
    """Held-out passages on which, at the end, the language model's loss is measured with reconstructions in place; 0 is off."""
    log_every: int = 50
    """Steps between two lines of the log."""
    log_to: tuple[str, ...] = ()
    """Where the log goes besides out/log.jsonl: "tensorboard", "wandb", "trackio"."""
    log_project: str = "writesae"
    """Name of the project at wandb or trackio."""
    save_every: int = 500
    """Steps between two checkpoints of a run that has a folder; 0 saves at the end and on interruption alone."""
    keep: int = 2
    """How many finished checkpoints are kept; an older one goes only after a newer one is on disk."""
    skip_positions: int = 1
    """Positions left out at the start of every passage; position 0 always holds the same token."""
    calibration_writes: int = 8192
    """Writes from which the input scale, the variance and (if centred) the mean are measured before the first step."""
    passages_per_forward: int = 8
    """Passages in one forward pass of the language model."""
    cache_bytes: int = 1 << 29
    """All records are kept in memory when they need at most this many bytes; otherwise a block of passages at a time is. The
    batches are the same either way."""
    buffer_writes: int = 65536
    """Samples in a block of passages, within which they are put into a random order."""

    def __post_init__(self) -> None:
        owner = "TrainConfig"
        require_positive(owner, steps=self.steps, batch_size=self.batch_size, lr=self.lr, lr_min=self.lr_min)
        require_positive(owner, dead_after=self.dead_after, log_every=self.log_every)
        require_positive(owner, calibration_writes=self.calibration_writes, buffer_writes=self.buffer_writes)
        require_positive(owner, passages_per_forward=self.passages_per_forward)
        require_at_least_zero(owner, warmup_steps=self.warmup_steps, grad_clip=self.grad_clip, aux_k=self.aux_k)
        require_positive(owner, keep=self.keep, bandwidth_final=self.bandwidth_final)
        require_at_least_zero(owner, aux_weight=self.aux_weight, resample_every=self.resample_every)
        require_at_least_zero(owner, save_every=self.save_every)
        require_at_least_zero(owner, sparsity_warmup_steps=self.sparsity_warmup_steps)
        require_at_least_zero(owner, splice_passages=self.splice_passages)
        require_one_of(owner, "schedule", self.schedule, SCHEDULES)
        require_one_of(owner, "precision", self.precision, PRECISIONS)
        for name in self.log_to:
            require_one_of(owner, "log_to", name, LOGS)
        require_at_least_zero(owner, skip_positions=self.skip_positions, cache_bytes=self.cache_bytes)
        if self.lr_min > self.lr:
            raise ValueError(f"TrainConfig.lr_min must be at most lr={self.lr}, got {self.lr_min}")
        if not 0 <= self.resample_until <= 1:
            raise ValueError(f"TrainConfig.resample_until must lie in 0..1, got {self.resample_until!r}")
        if self.buffer_writes < self.batch_size:
            batch = self.batch_size
            raise ValueError(f"TrainConfig.buffer_writes must hold a batch of {batch}, got {self.buffer_writes}")
