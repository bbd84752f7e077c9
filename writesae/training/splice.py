"""What a dictionary costs the language model: its next-token loss when reconstructions stand in for what they rebuild.

Three losses in nats per token: native; spliced, where the source's activation is replaced by its reconstruction at all
positions; and zeroed, where it is replaced by nothing. The share recovered,

    (zeroed - spliced) / (zeroed - native)

is 1 for a perfect dictionary and 0 for one that is no better than an empty memory; below 0 it does harm.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import mul

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.validation import NotFiniteError
from writesae.sae import Factored, WriteSAE
from writesae.stream.sources import VECTOR, Source, collect, describe

Replace = Callable[[Tensor], Tensor]
_BYTES_AT_ONCE = 1 << 28  # of the matrices of all heads, which a hook on writes or states makes the model form


@dataclass(frozen=True)
class Spliced:
    """Losses in nats per token, and the share of the loss that the reconstructions give back."""

    loss_native: float
    """Nothing is replaced."""
    loss_spliced: float
    """Every activation of the source is its reconstruction; infinite where states rebuilt from rebuilt ones blew up."""
    loss_zeroed: float
    """Every activation of the source is zero."""

    @property
    def loss_recovered(self) -> float:
        """(zeroed - spliced) / (zeroed - native); NaN where zeroing changes nothing."""
        cost = self.loss_zeroed - self.loss_native
        return (self.loss_zeroed - self.loss_spliced) / cost if cost else math.nan

    def to_dict(self) -> dict[str, float]:
        """The three losses and the share recovered, as far as they are finite numbers."""
        numbers = asdict(self) | {"loss_recovered": self.loss_recovered}
        return {name: value for name, value in numbers.items() if math.isfinite(value)}


@torch.no_grad()
def loss_recovered(
    model: HookedRecurrentModel, sae: WriteSAE, source: Source, tokens: Int[Tensor, "passage pos"]
) -> Spliced:
    """The three losses on these passages, a few at a time.

    A write is replaced at hook_write, by its reconstruction as a matrix; a state at hook_state, token by token, so every
    state is rebuilt from what the rebuilt ones before it have left; a vector at its own hook. Of a net write the
    dictionary rebuilds more than hook_write holds, so the same error is added there: net writes of the run without
    replacements, their reconstructions minus themselves (minus themselves alone, for the loss of zeroed ones).
    """
    if len(tokens) == 0:
        raise ValueError("loss_recovered needs at least one passage")
    about = describe(model, source)
    blocks = tokens.split(max(1, _BYTES_AT_ONCE // (4 * tokens.shape[1] * model.cfg.n_heads * about.d_k * about.d_v)))
    if source.form == "net":
        parts = [_net_losses(model, sae, source, block) for block in blocks]
    else:

        def rebuilt(x: Tensor) -> Tensor:
            return sae(x[..., None])[..., 0] if about.kind == VECTOR else sae(x)

        changes = (None, rebuilt, torch.zeros_like)
        parts = [[_loss(model, source, block, change) for change in changes] for block in blocks]
    weights = [len(block) / len(tokens) for block in blocks]
    return Spliced(*(sum(map(mul, losses, weights)) for losses in zip(*parts, strict=True)))


def _net_losses(model: HookedRecurrentModel, sae: WriteSAE, source: Source, tokens: Tensor) -> list[float]:
    """The three losses of passages whose net writes are rebuilt; what changes them is added to the additive writes."""
    record = collect(model, tokens, [source])[source]
    samples = Factored(record["key"].flatten(0, 1), record["value"].flatten(0, 1))
    native = samples.matrices().view(*tokens.shape, samples.d_k, samples.d_v)
    rebuilt = sae.decode(sae.encode_samples(samples)).view_as(native)
    shifts = (None, rebuilt - native, -native)
    return [_loss(model, source, tokens, None if shift is None else shift.add) for shift in shifts]


def _loss(model: HookedRecurrentModel, source: Source, tokens: Tensor, replace: Replace | None) -> float:
    """Mean loss of passages with the source's activation replaced."""
    if replace is None:
        return float(model(tokens, return_type="loss"))

    def splice(activation: Float[Tensor, "batch pos *rest"], hook: object) -> Float[Tensor, "batch pos *rest"]:
        changed = activation.clone()
        part = changed if source.head is None else changed[:, :, source.head]
        part.copy_(replace(part))
        return changed

    try:
        return float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(source.hook, splice)]))
    except NotFiniteError:  # a poor dictionary of states feeds on its own errors, token after token
        return math.inf
