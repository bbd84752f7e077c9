"""What a model is made of: frozen dataclasses, a sentence per field, unknown keys refused.

A `ModelConfig` describes the residual stream and names the kind of every layer; a rule's own config, in the rule's own file,
describes its heads. Sizes that only follow from others are properties, so no two fields can disagree.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, get_args

import torch

from hooked_recurrent.display.lines import OneLine, config_html

ATTENTION = "attention"
NORMS = ("rms", "layer")
MLPS = ("swiglu", "channel_mix")
BACKENDS = ("auto", "step", "chunked", "triton")
"""The scans; see scan/dispatch.py."""


def refuse_unknown(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise `TypeError` for the first given name that `owner` does not take, with the nearest that it does."""
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{owner} takes no {name!r}; {hint}")


def check_device(device: Any) -> torch.device:
    """The device of that name. Raises `ValueError` for a name that torch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be such as 'cpu', 'cuda' or 'cuda:0', got {device!r}") from None


KINDS = {int: (Integral, "a whole number"), float: (Real, "a number"), str: (str, "text"), bool: (bool, "True or False")}


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain kind; True counts as no number."""
    return isinstance(value, KINDS[kind][0]) and (kind is bool or not isinstance(value, bool))


class StrictConfig:
    """Base of every config: unknown fields and values of another kind are refused by name; `to_dict` gives plain JSON values.

    Only fields of plain kinds (whole number, number, text, True or False, or None beside them) are checked here: what a value
    may be beyond its kind is checked by the class itself.
    """

    def __new__(cls, *values: Any, **given: Any):
        """Refuse a keyword that is no field, with the nearest one."""
        refuse_unknown(cls.__name__, given, [field.name for field in fields(cls) if field.init])  # type: ignore[arg-type]
        return super().__new__(cls)

    def __init_subclass__(cls, **more: Any) -> None:
        """Check the kinds before a class's own `__post_init__` compares the values."""
        super().__init_subclass__(**more)
        own = cls.__dict__.get("__post_init__")

        def checked(self: Any) -> None:
            self._check_kinds()
            if own is not None:
                own(self)

        cls.__post_init__ = checked  # type: ignore[attr-defined]

    def _check_kinds(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
            plain = [kind for kind in kinds if kind is not type(None)]
            value = getattr(self, one.name)
            if all(kind in KINDS for kind in plain) and not (len(plain) < len(kinds) and value is None):
                if not any(_is_of(value, kind) for kind in plain):
                    wanted = " or ".join(KINDS[kind][1] for kind in plain)
                    raise TypeError(f"{type(self).__name__}.{one.name} must be {wanted}, got {value!r}")

    @classmethod
    def given(cls, config: Any) -> Any:
        """A config of this class as it is, and the default one for None. Raises `TypeError` for anything else."""
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be a {cls.__name__}, got {type(config).__name__}")
        return cls() if config is None else config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Build from a mapping; a key that is no field raises `ValueError` with the nearest field name.

        A list becomes a tuple, which is what the fields hold: JSON and YAML know no tuples.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} is made of a mapping of its fields, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}"
                raise ValueError(f"{cls.__name__} has no field {key!r}{hint}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload]

    def _repr_html_(self) -> str:
        """A row per field; what is at its default stands behind a click."""
        return config_html(self)


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


@dataclass(frozen=True, repr=False)
class ModelConfig(StrictConfig, OneLine):
    """A whole language model: residual stream, layer kinds, mixer and MLP sizes."""

    d_model: int
    """Width of the residual stream."""
    d_vocab: int
    """Rows of the embedding and columns of the unembedding."""
    d_mlp: int | None
    """Hidden width of the MLP of every block; None where blocks are a mixer alone."""
    layer_types: tuple[str, ...]
    """Per layer, the rule of its mixer (such as "gated_delta_net") or "attention"."""
    mixer: MixerConfig
    """Heads of the recurrent layers."""
    attention: AttentionConfig | None = None
    """Heads of the softmax layers; required exactly when layer_types names "attention"."""
    mlp: str = "swiglu"
    """Kind of those MLPs: "swiglu", or RWKV's "channel_mix"."""
    norm: str = "rms"
    """Kind of the norms on the residual stream: "rms", or "layer" with mean and bias."""
    norm_eps: float = 1e-6
    """Epsilon of the norms on the residual stream."""
    norm_offset: float = 1.0
    """What RMSNorms add to their stored weight: 1 for zero-centred weights (Qwen), 0 for plain ones."""
    embed_norm: bool = False
    """Whether the embedding is normalised before the first block (RWKV's ln0)."""
    residual_in_fp32: bool = False
    """Whether the residual stream stays in float32 when the weights are narrower."""
    tied_embeddings: bool = True
    """Whether the unembedding is the transposed embedding."""
    n_ctx: int = 32768
    """The longest context that the model was made for; nothing here enforces it on recurrent layers."""
    model_name: str = "unnamed"
    """Where the weights came from."""
    backend: str = "auto"
    """Which scan runs where a call names none: "auto", or "step", "chunked" or "triton" by force."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        require_positive("ModelConfig", d_model=self.d_model, d_vocab=self.d_vocab, n_layers=self.n_layers)
        require_positive("ModelConfig", norm_eps=self.norm_eps, d_mlp=1 if self.d_mlp is None else self.d_mlp)
        for field, value, kinds in (
            ("norm", self.norm, NORMS),
            ("mlp", self.mlp, MLPS),
            ("backend", self.backend, BACKENDS),
        ):
            if value not in kinds:
                raise ValueError(f"{field} must be {' or '.join(map(repr, kinds))}, got {value!r}")
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
    def n_key_value_heads(self) -> None:
        """None: transformer_lens's tools then sweep `n_heads` heads; hook_q, hook_k and hook_v may each have fewer."""
        return None

    @property
    def attn_only(self) -> bool:
        """transformer_lens's name for blocks without MLPs."""
        return self.d_mlp is None

    @property
    def normalization_type(self) -> str:
        """transformer_lens's name for the kind of the norms on the residual stream."""
        return {"rms": "RMS", "layer": "LN"}[self.norm]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of transformer_lens's tables of numbers; the weights may have any."""
        return torch.float32

    @property
    def default_prepend_bos(self) -> bool:
        """False where transformer_lens asks the config: here `to_tokens` asks the tokenizer whether it has a BOS token."""
        return False

    @property
    def device(self) -> str:
        """Where transformer_lens's patching tools lay out their tables of numbers; the weights may be anywhere."""
        return "cpu"

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a matrix memory."""
        return tuple(layer for layer, kind in enumerate(self.layer_types) if kind != ATTENTION)
