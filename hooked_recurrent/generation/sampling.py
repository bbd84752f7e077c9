"""How the next token is chosen from the logits: greedily, or at random after transformers' own logits warpers."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hooked_recurrent.factors import state_dtype


@dataclass(frozen=True)
class Sampling:
    """How to choose; `do_sample=False` is greedy, and the others must then be left as they are."""

    do_sample: bool = False
    """Whether to draw at random."""
    temperature: float = 1.0
    """What the logits are divided by first."""
    top_k: int | None = None
    """Draw among the k likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    freq_penalty: float = 0.0
    """Taken off a token's logit, after the temperature, for every time that the text holds it (as in transformer_lens)."""

    def check(self, d_vocab: int) -> None:
        """Raise `ValueError` for a number that is out of range, and for one that a greedy choice would not look at."""
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}; do_sample=False is greedy")
        if self.top_k is not None and not 1 <= self.top_k <= d_vocab:
            raise ValueError(f"top_k must be between 1 and {d_vocab}, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {self.top_p}")
        if not self.freq_penalty >= 0:
            raise ValueError(f"freq_penalty must not be negative, got {self.freq_penalty}")
        if not self.do_sample:
            for one in fields(self):
                came = getattr(self, one.name)
                if came != one.default:
                    raise ValueError(f"{one.name}={came} changes nothing in a greedy choice: give do_sample=True too")

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        text: Int[Tensor, "batch pos"],
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch"]:
        """The next token of every row; `text` is what the frequency penalty counts in."""
        if not self.do_sample:
            return logits.argmax(-1)
        scores = logits.to(state_dtype(logits.dtype))
        if self.temperature != 1.0:
            scores = TemperatureLogitsWarper(float(self.temperature))(text, scores)
        if self.freq_penalty:
            counts = torch.zeros_like(scores).scatter_add_(1, text, torch.ones_like(text, dtype=scores.dtype))
            scores = scores - self.freq_penalty * counts
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(text, scores)
        if self.top_p is not None:
            scores = TopPLogitsWarper(float(self.top_p))(text, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
