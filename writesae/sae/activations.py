"""Sparsifiers: which atoms of a row of scores are active, and what coefficient an active score becomes.

A sparsifier splits in two, so that scores are differentiated at the chosen atoms only: `select` picks the atoms,
without gradient, and `apply` turns the chosen scores into coefficients. Scores and thresholds are in scaled units.

    topk        the k largest scores of every sample, then ReLU (Gao et al. 2024, arXiv:2406.04093)
    batch_topk  the k * batch largest of the whole batch; for inference a threshold learned meanwhile, so that a code does
                not depend on its neighbours (Bussmann et al. 2024, arXiv:2412.06410)
    jumprelu    z where z > theta, a threshold per atom learned by straight-through windows (Rajamanoharan et al. 2024,
                arXiv:2407.14435)
    gated       ReLU(e^r s + b_mag) where s + b_gate > 0 (Rajamanoharan et al. 2024, arXiv:2404.16014)
    soft_gated  sigmoid((s + b_gate) / 0.1) ReLU(e^r s + b_mag): what the paper's code ships as gated; never quite zero

Sparsity that is not counted out has to be paid for: `penalty` is what a training step adds to the loss.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hooked_recurrent.display import OneLine
from writesae.config import WriteSAEConfig
from writesae.parallel import World

_GROUPS = 256  # rows of this many group maxima are fastest on the CPU at 2,048 atoms
THRESHOLD_RATE = 0.01
"""Share of the way that batch_topk's inference threshold moves towards the smallest kept score, per step."""
GATE_TEMPERATURE = 0.1
"""Width of soft_gated's sigmoid (the paper's code)."""


def largest(scores: Float[Tensor, "batch n_atoms"], k: int) -> Int[Tensor, "batch k"]:
    """Indices of the k largest scores of every row, in no particular order.

    On the CPU a row is first cut into groups: the k largest entries lie in the k groups with the largest maxima,
    because every one of those groups holds an entry at least as large as any entry outside them. So the exact search
    runs over two short rows, not one long one.
    """
    n_atoms = scores.shape[1]
    if scores.device.type != "cpu" or n_atoms % _GROUPS or n_atoms < 4 * _GROUPS or k > _GROUPS // 4:
        return scores.topk(k, sorted=False).indices
    maxima = scores.view(-1, n_atoms // _GROUPS, _GROUPS).amax(1)
    groups = maxima.topk(k, sorted=False).indices
    members = torch.arange(0, n_atoms, _GROUPS, device=scores.device)
    candidates = (members[None, :, None] + groups[:, None, :]).flatten(1)
    return candidates.gather(1, scores.gather(1, candidates).topk(k, sorted=False).indices)


@dataclass(frozen=True, repr=False)
class Choice(OneLine):
    """The atoms of every sample that may be active."""

    indices: Int[Tensor, "batch chosen"]
    """Their numbers; rows with fewer are filled up with other atoms."""
    keep: Bool[Tensor, "batch chosen"] | None = None
    """False where an index only fills its row; None where every index counts."""


def above(margins: Float[Tensor, "batch n_atoms"]) -> Choice:
    """All atoms with a positive margin, in rows as long as the fullest one (at least one index)."""
    most = int((margins > 0).sum(1).max()) if len(margins) else 0
    indices = margins.topk(max(most, 1), sorted=False).indices
    return Choice(indices, margins.gather(1, indices) > 0)


class Activation(nn.Module, ABC):
    """Base of the sparsifiers. `biased` says whether the encoder adds a bias of its own."""

    biased = True
    bandwidth: float
    """Width of jumprelu's straight-through windows now; a schedule may move it."""
    sparsity: float
    """Weight of the penalty now; a schedule may move it."""

    def __init__(self, config: WriteSAEConfig):
        super().__init__()
        self.k, self.bandwidth, self.sparsity = config.k, config.bandwidth, config.sparsity

    @abstractmethod
    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        """The atoms that may be active; no gradient. `training` may choose otherwise than inference does."""

    def apply(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        """Coefficients of the chosen atoms."""
        values = chosen_scores.relu()
        return values if choice.keep is None else values * choice.keep

    def gates(
        self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice
    ) -> Float[Tensor, "batch chosen"] | None:
        """Coefficients by which the gate alone must rebuild the input through frozen atoms; None without a gate."""
        return None

    def penalty(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, ""] | None:
        """What the sparsity costs, mean over samples, weighted; None where sparsity is counted out."""
        return None

    def absorb_(self, offsets: Float[Tensor, " n_atoms"]) -> None:
        """Take these offsets of the scores into the sparsifier's own biases, where the encoder has none."""

    def amplify_(self, factor: Float[Tensor, ""]) -> None:
        """The scores have been multiplied by `factor`."""

    def reset_(self, atoms: Int[Tensor, " chosen"], alive: Int[Tensor, " alive"]) -> None:
        """Start the chosen atoms' own parameters afresh."""


class TopK(Activation):
    """The k largest SIGNED scores, then ReLU: at most k atoms are active."""

    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        return Choice(largest(scores.detach(), self.k))


class BatchTopK(Activation):
    """k atoms per sample on average. `threshold` is a buffer: the running mean of the smallest kept score."""

    threshold: Tensor

    def __init__(self, config: WriteSAEConfig):
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(()))
        self.world = World()

    @torch.no_grad()
    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        if not training:
            return above((scores - self.threshold).where(scores > 0, -1.0))
        cut = self._cut(scores)
        kept = scores >= cut
        smallest = -self.world.max_(-scores.where(kept, torch.inf).amin())
        if torch.isfinite(smallest):
            fresh = self.threshold == 0
            self.threshold.lerp_(smallest, 1.0 if fresh else THRESHOLD_RATE)
        return above((scores - cut + torch.finfo(scores.dtype).tiny).where(kept, -1.0))

    def _cut(self, scores: Tensor) -> Tensor:
        """The smallest score that is kept: positive, and the (k * batch)-th largest of the batch of all processes."""
        total = int(self.world.sum_(torch.tensor(len(scores))))
        wanted = min(self.k * total, scores.numel())
        candidates = self.world.all_gather(scores.flatten().topk(wanted, sorted=False).values)
        cut = candidates.topk(min(self.k * total, len(candidates)), sorted=False).values.amin()
        return cut.clamp_min(torch.finfo(scores.dtype).tiny)

    def amplify_(self, factor: Float[Tensor, ""]) -> None:
        self.threshold.mul_(factor)


class _JumpReLU(torch.autograd.Function):
    """z where z > theta; d/d theta = -(theta / h) inside a window of width h, which stands for the jump."""

    @staticmethod
    def forward(ctx, scores, thresholds, bandwidth):
        ctx.save_for_backward(scores, thresholds)
        ctx.bandwidth = bandwidth
        return scores * (scores > thresholds)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, thresholds = ctx.saved_tensors
        window = ((scores - thresholds).abs() <= ctx.bandwidth / 2) / ctx.bandwidth
        return grad * (scores > thresholds), -grad * thresholds * window, None


class _CountAbove(torch.autograd.Function):
    """1 where z > theta; d/d theta = -1 / h inside the window, and nothing reaches z."""

    @staticmethod
    def forward(ctx, scores, thresholds, bandwidth):
        ctx.save_for_backward(scores, thresholds)
        ctx.bandwidth = bandwidth
        return (scores > thresholds).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, thresholds = ctx.saved_tensors
        window = ((scores - thresholds).abs() <= ctx.bandwidth / 2) / ctx.bandwidth
        return None, -grad * window, None


class JumpReLU(Activation):
    """z where z > theta_i = exp(log_threshold_i). The penalty is the number of active atoms, felt by the thresholds."""

    def __init__(self, config: WriteSAEConfig):
        super().__init__(config)
        self.log_threshold = nn.Parameter(torch.full((config.n_atoms,), config.init_threshold).log())

    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        """In training also the atoms whose window is met: their thresholds learn."""
        margins = scores.detach() - self.log_threshold.detach().exp()
        choice = above(margins + self.bandwidth / 2 if training else margins)
        return Choice(choice.indices)

    def _thresholds_at(self, choice: Choice) -> Tensor:
        flat = choice.indices.reshape(-1)
        return self.log_threshold.index_select(0, flat).view(choice.indices.shape).exp()

    def apply(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        return _JumpReLU.apply(chosen_scores, self._thresholds_at(choice), self.bandwidth)

    def penalty(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, ""]:
        counts = _CountAbove.apply(chosen_scores, self._thresholds_at(choice), self.bandwidth)
        return self.sparsity * counts.sum(1).mean()

    @torch.no_grad()
    def reset_(self, atoms: Int[Tensor, " chosen"], alive: Int[Tensor, " alive"]) -> None:
        if len(alive):
            self.log_threshold[atoms] = self.log_threshold[alive].mean()


class Gated(Activation):
    """A hard gate s + gate_bias > 0 and a magnitude ReLU(exp(log_magnitude) s + magnitude_bias) of the same score s."""

    biased = False

    def __init__(self, config: WriteSAEConfig):
        super().__init__(config)
        for name in ("gate_bias", "magnitude_bias", "log_magnitude"):
            setattr(self, name, nn.Parameter(torch.zeros(config.n_atoms)))

    def _at(self, parameter: Tensor, choice: Choice) -> Tensor:
        return parameter.index_select(0, choice.indices.reshape(-1)).view(choice.indices.shape)

    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        return above(scores.detach() + self.gate_bias.detach())

    def magnitudes(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        """ReLU(e^r s + b_mag)."""
        slope = self._at(self.log_magnitude, choice).exp()
        return (slope * chosen_scores + self._at(self.magnitude_bias, choice)).relu()

    def apply(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        return self.magnitudes(chosen_scores, choice) * choice.keep

    def gates(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        return (chosen_scores + self._at(self.gate_bias, choice)).relu() * choice.keep

    def penalty(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, ""]:
        return self.sparsity * self.gates(chosen_scores, choice).sum(1).mean()

    @torch.no_grad()
    def absorb_(self, offsets: Float[Tensor, " n_atoms"]) -> None:
        self.gate_bias.copy_(offsets)
        self.magnitude_bias.copy_(offsets)

    @torch.no_grad()
    def amplify_(self, factor: Float[Tensor, ""]) -> None:
        self.gate_bias.mul_(factor)
        self.magnitude_bias.mul_(factor)

    @torch.no_grad()
    def reset_(self, atoms: Int[Tensor, " chosen"], alive: Int[Tensor, " alive"]) -> None:
        for parameter in (self.gate_bias, self.magnitude_bias, self.log_magnitude):
            parameter[atoms] = 0.0


class SoftGated(Gated):
    """A soft gate sigmoid((s + gate_bias) / 0.1) times the magnitude: every atom takes part in every sample."""

    def select(self, scores: Float[Tensor, "batch n_atoms"], training: bool) -> Choice:
        everyone = torch.arange(scores.shape[1], device=scores.device)
        return Choice(everyone.expand(scores.shape))

    def gates(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        return ((chosen_scores + self._at(self.gate_bias, choice)) / GATE_TEMPERATURE).sigmoid()

    def apply(self, chosen_scores: Float[Tensor, "batch chosen"], choice: Choice) -> Float[Tensor, "batch chosen"]:
        return self.gates(chosen_scores, choice) * self.magnitudes(chosen_scores, choice)


ACTIVATIONS: dict[str, type[Activation]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "soft_gated": SoftGated,
}
