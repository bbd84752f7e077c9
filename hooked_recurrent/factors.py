"""The vocabulary: axis words, and the six roles that every recurrence in this project is made of.

Per head, with a matrix state S [d_k, d_v],

    S_t = diag(d_t) S_{t-1}  +  a_t (b_t^T S_{t-1})  +  sum_m k_{t,m} v_{t,m}^T        o_t = S_t^T q_t
          ---- decay ----       -- erase, probe --      - write key, write value -     - read with query -

The factors are named by role, never by letter. Axis words, used in every annotation:

    batch   sequences          pos    token positions        head   value heads (keys already expanded)
    d_k     the side of the state that the query contracts   d_v    the side that leaves through W_O
    term    several rank-1 writes at one position

The write is a sum of `term` outer products, one in every native run. It is decoupled from the erase, so an edited write
leaves what the model erases as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.display import OneLine

State = Float[Tensor, "batch head d_k d_v"]
Before = Float[Tensor, "batch_or_1 head d_k d_v"]
"""The state before a stretch: one per row, or a single one that serves every row and is not copied."""
Read = Float[Tensor, "batch pos head d_v"]


@dataclass(frozen=True, repr=False)
class Factors(OneLine):
    """The six roles over a stretch of positions, exactly as the recurrence consumes them."""

    log_decay: Float[Tensor, "batch pos head *d_k"]
    """log d_t <= 0: one number per head [batch, pos, head], or one per key channel [batch, pos, head, d_k]."""
    write_key: Float[Tensor, "batch pos head *term d_k"]
    """Key side of the write: [batch, pos, head, d_k], or [batch, pos, head, term, d_k] for several writes at once."""
    write_value: Float[Tensor, "batch pos head *term d_v"]
    """Value side of the write, with the same term axis as write_key."""
    query: Float[Tensor, "batch pos head d_k"]
    """q_t, which reads the state after the write."""
    erase: Float[Tensor, "batch pos head d_k"] | None = None
    """a_t, where the removal lands; None where the rule never erases."""
    probe: Float[Tensor, "batch pos head d_k"] | None = None
    """b_t, what the old state is asked before the removal; None exactly when erase is None."""
    erase_strength: Float[Tensor, "batch pos head"] | None = None
    """The native shortcut: with erase and probe left None it says probe = write_key and erase = strength * write_key.

    A delta rule that nobody edited has this form, and the chunked scan then needs two Gram matrices instead of four.
    """

    def __post_init__(self) -> None:
        if (self.erase is None) != (self.probe is None):
            raise ValueError("erase and probe come together: one was given and the other is None")
        if self.erase is not None and self.erase_strength is not None:
            raise ValueError("give either erase and probe, or erase_strength, not both")
        if self.erase_strength is not None and self.write_key.ndim == 5:
            raise ValueError("erase_strength ties the erase to a single write; this position has several terms")
        batch_pos_head = self.query.shape[:3]
        for name in ("log_decay", "write_key", "write_value", "erase", "probe", "erase_strength"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[:3] != batch_pos_head:
                came, expected = tuple(tensor.shape[:3]), tuple(batch_pos_head)
                raise ValueError(f"{name} has [batch, pos, head] = {came}, but query has {expected}")
        for name in ("write_key", "erase", "probe", *(["log_decay"] if self.vector_decay else [])):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape[-1] != self.d_k:
                raise ValueError(f"{name} has width {tensor.shape[-1]}, but query has d_k = {self.d_k}")
        if self.write_key.shape[:-1] != self.write_value.shape[:-1]:
            key_terms, value_terms = tuple(self.write_key.shape[3:-1]), tuple(self.write_value.shape[3:-1])
            raise ValueError(f"write_key and write_value need as many write terms, got {key_terms} and {value_terms}")

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.query.shape[1]

    @property
    def d_k(self) -> int:
        """Key width."""
        return self.query.shape[-1]

    @property
    def d_v(self) -> int:
        """Value width."""
        return self.write_value.shape[-1]

    @property
    def vector_decay(self) -> bool:
        """Whether every key channel decays at its own rate."""
        return self.log_decay.ndim == 4

    @property
    def erases(self) -> bool:
        """Whether the rule removes anything before it writes."""
        return self.erase is not None or self.erase_strength is not None

    def decoupled(self) -> "Factors":
        """The same recurrence with erase and probe written out, free of the write."""
        if self.erase_strength is None:
            return self
        erase = self.erase_strength[..., None] * self.write_key
        return replace(self, erase=erase, probe=self.write_key, erase_strength=None)

    def with_terms(self, added: "Factors | None") -> "Factors":
        """The same with further write terms: those of `added`, whose writes have a term axis. None adds nothing."""
        if added is None:
            return self
        key, value = (
            torch.cat([side[:, :, :, None], more], dim=3)
            for side, more in ((self.write_key, added.write_key), (self.write_value, added.write_value))
        )
        return replace(self.decoupled(), write_key=key, write_value=value)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        """A copy with `change` applied to every tensor that is present."""
        present = {name: change(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **present)

    def at(self, positions: slice) -> "Factors":
        """The factors of a slice of positions."""
        if positions == slice(0, self.length):
            return self
        return self.map(lambda tensor: tensor[:, positions])

    def heads(self, heads: slice) -> "Factors":
        """The factors of a slice of heads."""
        return self.map(lambda tensor: tensor[:, :, heads])

    def write_matrix(self) -> Float[Tensor, "batch pos head d_k d_v"]:
        """The write as a matrix, sum over terms of k v^T, in the state's dtype. Materialises [d_k, d_v] for every position."""
        dtype = state_dtype(self.write_key.dtype)
        return outer(self.write_key.to(dtype), self.write_value.to(dtype), several=self.write_key.ndim == 5)

    def zero_state(self) -> State:
        """An empty memory for these factors, float32 or wider."""
        batch, _, heads, d_k = self.query.shape
        dtype = state_dtype(self.query.dtype)
        return torch.zeros(batch, heads, d_k, self.d_v, dtype=dtype, device=self.query.device)


def picked(
    tensor: Float[Tensor, "batch_or_1 pos *rest"], at: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some *rest"]:
    """The entries at some positions of each row; one row may serve all."""
    tensor = tensor.expand(len(at), *tensor.shape[1:])
    return tensor[torch.arange(len(at), device=at.device)[:, None], at]


def outer(
    key: Float[Tensor, "*place d_k"], value: Float[Tensor, "*place d_v"], *, several: bool
) -> Float[Tensor, "*where d_k d_v"]:
    """k v^T at every place, or its sum over the last axis of the places, the terms, when there are several."""
    if several:
        return torch.einsum("...mk,...mv->...kv", key, value)
    return key[..., :, None] * value[..., None, :]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state whose factors have this dtype: never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)
