"""Generation with hooks and edits at prompt and generated positions, token by token."""

from hooked_recurrent.generation.generate import GenerationMixin
from hooked_recurrent.generation.sampling import Sampling

__all__ = ["GenerationMixin", "Sampling"]
