"""The three ways to one training step of a sparse dictionary over matrices [d_k, d_v] that `sae.py` compares.

    ours      `writesae.training.Trainer.advance` on factors: loss, backward, clipping, Adam, renormalised atoms, counters
    dense     the published formulation (arXiv:2605.12770), written here from its formulas, on matrices: every atom meets
              every matrix in two einsums, z = p^T X r + c, a = ReLU(TopK(z)), X_hat = sum_i a_i v_i w_i^T; loss, backward,
              Adam
    SAELens   its own TopKTrainingSAE on the flattened matrices: training_forward_pass, backward, clipping to norm 1 as its
              trainer does, Adam; no atom is dead, so its auxiliary loss idles

The last two are given the dictionary of the first, SAELens as the flattened matrices of the encoder's and the decoder's
atoms, so that all three must have the same loss before a clock starts. All use fused Adam in float32.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from writesae import TrainConfig, WriteSAE, WriteSAEConfig
from writesae.sae import Factored, Samples
from writesae.training import Trainer

NEVER = 10**9
LOSS_BOUND = 1e-4
Step = Callable[[], object]


def has_sae_lens() -> bool:
    """Whether SAELens is installed here."""
    return importlib.util.find_spec("sae_lens") is not None


class DenseBilinearSAE(nn.Module):
    """The published formulation: every atom meets every matrix, active or not."""

    def __init__(self, like: WriteSAE):
        super().__init__()
        self.k = like.config.k
        self.key_encoder = nn.Parameter(like.encoder.key_factors.detach().clone())
        self.value_encoder = nn.Parameter(like.encoder.value_factors.detach().clone())
        self.bias = nn.Parameter(like.encoder.bias.detach().clone())
        self.key_atoms = nn.Parameter(like.key_atoms.detach().clone())
        self.value_atoms = nn.Parameter(like.value_atoms.detach().clone())

    def loss(self, x: Tensor) -> Tensor:
        """Mean over samples of |X - X_hat|^2; X in scaled units."""
        scores = torch.einsum("nrk,bkv,nrv->bn", self.key_encoder, x, self.value_encoder) + self.bias
        values, indices = scores.topk(self.k, dim=-1)
        codes = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        rebuilt = torch.einsum("bn,nrk,nrv->bkv", codes, self.key_atoms, self.value_atoms)
        return (x - rebuilt).square().sum((1, 2)).mean()


def dense_step(like: WriteSAE, x: Tensor) -> tuple[Step, float]:
    """A step of the published formulation on matrices in scaled units, and its loss before the first one."""
    dense = DenseBilinearSAE(like)
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        dense.loss(x).backward()
        optimizer.step()

    with torch.no_grad():
        return step, float(dense.loss(x))


def sae_lens_step(like: WriteSAE, x: Tensor) -> tuple[Step, float]:
    """A step of SAELens's TopKTrainingSAE on the flattened matrices, and its loss before the first one."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = like.config
    flat = x.flatten(1)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=config.d_k * config.d_v, d_sae=config.n_atoms, k=config.k, device="cpu")
    )
    with torch.no_grad():
        for atom in range(config.n_atoms):  # atom by atom: all at once would need the memory of the weights again
            sae.W_enc[:, atom] = (like.encoder.key_factors[atom].T @ like.encoder.value_factors[atom]).flatten()
            sae.W_dec[atom] = (like.key_atoms[atom].T @ like.value_atoms[atom]).flatten()
        sae.b_enc.copy_(like.encoder.bias)
        sae.b_dec.zero_()
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    given = TrainStepInput(
        sae_in=flat,
        coefficients={},
        dead_neuron_mask=torch.zeros(config.n_atoms, dtype=torch.bool),
        n_training_steps=0,
        is_logging_step=False,
    )

    def step() -> None:
        optimizer.zero_grad()
        sae.training_forward_pass(given).loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    with torch.no_grad():
        return step, float(sae.training_forward_pass(given).loss)


def our_step(sae: WriteSAE, make: Callable[[], Samples]) -> tuple[Step, float]:
    """A step of ours on the samples that `make` gives, and its loss before the first one; no atom is ever dead."""
    config = TrainConfig(steps=NEVER, lr=1e-3, dead_after=NEVER, resample_every=0, log_every=NEVER)
    trainer = Trainer(sae.train(), config)
    with torch.no_grad():
        loss = float(sae.loss(make()).loss)
    return lambda: trainer.advance(make()), loss


def dictionary(width: int, n_atoms: int, k: int) -> WriteSAE:
    """The dictionary that all sides start from, at d_k = d_v = width."""
    return WriteSAE(WriteSAEConfig(d_k=width, d_v=width, n_atoms=n_atoms, k=k))


def writes(width: int, n: int) -> Factored:
    """Writes with keys of unit length and Gaussian values."""
    generator = torch.Generator().manual_seed(width)
    key = nn.functional.normalize(torch.randn(n, width, generator=generator), dim=-1)
    return Factored(key, torch.randn(n, width, generator=generator))


def net_writes(width: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_decay [1, pos], keys and values [1, pos, d] of one passage whose states hold some ten writes each."""
    generator = torch.Generator().manual_seed(length)
    batch = writes(width, length)
    return -0.2 * torch.rand(1, length, generator=generator), batch.key.transpose(0, 1), batch.value.transpose(0, 1)


def must_agree(where: str, losses: dict[str, float]) -> float:
    """The largest relative difference of the losses from ours; `RuntimeError` when it reaches `LOSS_BOUND`."""
    ours = losses["ours"]
    off = {side: abs(loss - ours) / abs(ours) for side, loss in losses.items()}
    worst = max(off, key=lambda side: off[side])
    if not off[worst] < LOSS_BOUND:
        raise RuntimeError(
            f"the sides do not compute the same loss at {where}: {losses[worst]} ({worst}) and {ours} (ours)"
        )
    return off[worst]
