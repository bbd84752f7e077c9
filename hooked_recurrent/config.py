"""What a model is made of: frozen dataclasses, a sentence per field, unknown keys refused.

A `ModelConfig` describes the residual stream and names the kind of every layer; one small config per kind of mixer
describes its heads. Sizes that only follow from others are properties, so no two fields can disagree.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar

ATTENTION = "attention"


class StrictConfig:
    """Base of every config: `from_dict` refuses unknown keys by name, `to_dict` gives plain JSON values."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Build from a mapping; a key that is no field raises `ValueError` with the nearest field name."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}"
                raise ValueError(f"{cls.__name__} has no field {key!r}{hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]


def require_positive(owner: str, **values: int | float) -> None:
    """Raise `ValueError` naming the first value that is not greater than zero."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{owner}.{name} must be greater than 0, got {value!r}")


class MixerConfig(StrictConfig):
    """Base of every rule's config: what the rest of the model may ask of a mixer without knowing its rule."""

    rule: ClassVar[str]
    """Name of the rule; `ModelConfig.layer_types` spells it so."""
    n_heads: int
    """Value heads; the state, the writes and every role factor have this many heads."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O."""


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Heads of a Gated DeltaNet mixer (Yang et al. 2024, arXiv:2412.06464; as in Qwen3-Next and Qwen3.5)."""

    n_heads: int
    """Value heads; the state, the writes and every role factor have this many heads."""
    n_key_heads: int
    """Key and query heads before expansion; must divide n_heads (grouped value attention)."""
    d_k: int
    """Width of the side of the state that the query contracts."""
    d_v: int
    """Width of the side of the state that leaves through W_O."""
    conv_size: int = 4
    """Taps of the short causal convolution over q, k and v."""
    norm_eps: float = 1e-6
    """Epsilon of the gated RMSNorm before W_O."""

    rule: ClassVar[str] = "gated_delta_net"

    def __post_init__(self) -> None:
        require_positive("GatedDeltaNetConfig", n_heads=self.n_heads, n_key_heads=self.n_key_heads, d_k=self.d_k)
        require_positive("GatedDeltaNetConfig", d_v=self.d_v, conv_size=self.conv_size, norm_eps=self.norm_eps)
        if self.n_heads % self.n_key_heads:
            raise ValueError(f"n_key_heads must divide n_heads, got {self.n_key_heads} and {self.n_heads}")


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Heads of a Mamba-2 mixer (Dao and Gu 2024, arXiv:2405.21060)."""

    n_heads: int
    """Heads of x; the state, the writes and every role factor have this many heads."""
    n_groups: int
    """Groups of heads that share B and C (and are normalised together); must divide n_heads."""
    d_k: int
    """Width of B and C, the paper's state size N: the side of the state that the query contracts."""
    d_v: int
    """Width of x per head, the paper's head dimension P: the side of the state that leaves through W_O."""
    conv_size: int = 4
    """Taps of the short causal convolution over x, B and C."""
    conv_bias: bool = True
    """Whether that convolution has a bias."""
    bias: bool = False
    """Whether the projections into and out of the mixer have biases."""
    dt_limit: tuple[float, float] = (0.0, math.inf)
    """The step size dt is clamped to this range."""
    norm_eps: float = 1e-5
    """Epsilon of the gated RMSNorm before W_O."""
    norm_before_gate: bool = False
    """Whether that norm comes before the gate; in every released Mamba-2 model it comes after."""

    rule: ClassVar[str] = "mamba2"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dt_limit", tuple(self.dt_limit))
        require_positive("Mamba2Config", n_heads=self.n_heads, n_groups=self.n_groups, d_k=self.d_k, d_v=self.d_v)
        require_positive("Mamba2Config", conv_size=self.conv_size, norm_eps=self.norm_eps)
        if self.n_heads % self.n_groups:
            raise ValueError(f"n_groups must divide n_heads, got {self.n_groups} and {self.n_heads}")
        if len(self.dt_limit) != 2 or not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            raise ValueError(f"dt_limit must be (low, high) with 0 <= low < high, got {self.dt_limit}")


@dataclass(frozen=True)
class AttentionConfig(StrictConfig):
    """Heads of the softmax layers of a hybrid: output-gated attention with q/k norm and partial rotary embedding."""

    n_heads: int
    """Query heads."""
    n_key_value_heads: int
    """Key/value heads; must divide n_heads."""
    d_head: int
    """Width of every head."""
    rotary_dims: int
    """How many leading dimensions of q and k are rotated (even)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    bias: bool = False
    """Whether the four projections have biases."""
    norm_eps: float = 1e-6
    """Epsilon of the q and k norms."""

    def __post_init__(self) -> None:
        require_positive("AttentionConfig", n_heads=self.n_heads, n_key_value_heads=self.n_key_value_heads)
        require_positive("AttentionConfig", d_head=self.d_head, norm_eps=self.norm_eps, rope_theta=self.rope_theta)
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"n_key_value_heads must divide n_heads, got {self.n_key_value_heads} and {self.n_heads}")
        if self.rotary_dims % 2 or not 0 <= self.rotary_dims <= self.d_head:
            raise ValueError(f"rotary_dims must be even and at most d_head={self.d_head}, got {self.rotary_dims}")


# Every recurrent rule's config class by rule name; a new rule adds its line here.
MIXER_CONFIGS: dict[str, type[MixerConfig]] = {
    GatedDeltaNetConfig.rule: GatedDeltaNetConfig,
    Mamba2Config.rule: Mamba2Config,
}


@dataclass(frozen=True)
class ModelConfig(StrictConfig):
    """A whole language model: residual stream, layer kinds, mixer and MLP sizes."""

    d_model: int
    """Width of the residual stream."""
    d_vocab: int
    """Rows of the embedding and columns of the unembedding."""
    d_mlp: int | None
    """Hidden width of the SwiGLU MLP of every block; None where blocks are a mixer alone."""
    layer_types: tuple[str, ...]
    """Per layer, the rule of its mixer (such as "gated_delta_net") or "attention"."""
    mixer: MixerConfig
    """Heads of the recurrent layers."""
    attention: AttentionConfig | None = None
    """Heads of the softmax layers; required exactly when layer_types names "attention"."""
    norm_eps: float = 1e-6
    """Epsilon of the RMSNorms on the residual stream."""
    norm_offset: float = 1.0
    """What those norms add to their stored weight: 1 for zero-centred weights (Qwen), 0 for plain ones."""
    residual_in_fp32: bool = False
    """Whether the residual stream stays in float32 when the weights are narrower."""
    tied_embeddings: bool = True
    """Whether the unembedding is the transposed embedding."""
    n_ctx: int = 32768
    """The longest context that the model was made for; nothing here enforces it on recurrent layers."""
    model_name: str = "unnamed"
    """Where the weights came from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        require_positive("ModelConfig", d_model=self.d_model, d_vocab=self.d_vocab, n_layers=self.n_layers)
        require_positive("ModelConfig", norm_eps=self.norm_eps, d_mlp=1 if self.d_mlp is None else self.d_mlp)
        known = (self.mixer.rule, ATTENTION)
        for layer, kind in enumerate(self.layer_types):
            if kind not in known:
                raise ValueError(f"layer {layer} is of type {kind!r}; this model's layers are {' or '.join(known)}")
        if (ATTENTION in self.layer_types) != (self.attention is not None):
            raise ValueError("attention must be given exactly when a layer of layer_types is 'attention'")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layer_types)

    @property
    def n_heads(self) -> int:
        """Heads of every recurrent layer."""
        return self.mixer.n_heads

    @property
    def d_k(self) -> int:
        """Key width of every recurrent head."""
        return self.mixer.d_k

    @property
    def d_v(self) -> int:
        """Value width of every recurrent head."""
        return self.mixer.d_v

    @property
    def d_head(self) -> int:
        """transformer_lens's name for the width that leaves a head through W_O: d_v."""
        return self.mixer.d_v

    @property
    def device(self) -> str:
        """Where transformer_lens's patching tools lay out their tables of numbers; the weights may be anywhere."""
        return "cpu"

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a matrix memory."""
        return tuple(layer for layer, kind in enumerate(self.layer_types) if kind != ATTENTION)
