"""What a run leaves: chosen activations, writes and states on demand, gradients of every write, the residual stream's parts."""

from hooked_recurrent.cache.recurrent_cache import RecurrentCache

__all__ = ["RecurrentCache"]
