"""A training step on writes: the dense bilinear formulation against the factored one, in one process, in turn.

    python benchmarks/sae_step.py [--widths 64 128 256] [--repeats 7] [--threads N] [--json PATH]

Both train the same dictionary (2,048 atoms, k = 32, untied bilinear encoder, rank-1 decoder, TopK) on the same batch of 256
writes, in float32, with fused Adam.

    dense     takes the writes as matrices [batch, d, d] and follows the formulas of the paper (arXiv:2605.12770) with dense
              einsums over all atoms: z = p^T X r + c, a = ReLU(TopK(z)), X_hat = sum_i a_i v_i w_i^T, mean squared error;
              loss, backward, Adam. Its matrices are ready before the clock starts.
    factored  is `writesae.training.Trainer.advance` on the writes' factors: loss, backward, clipping, Adam, renormalised
              atoms, dead-atom counters. No atom is dead, so neither side revives any.

Before the clock starts both must give the same loss from the same weights. Each repeat times one step of each in turn, and the
table shows medians, so that a machine whose speed drifts drifts for both.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from support.machine import machine, median_seconds
from support.report import print_machine, write_json
from torch import Tensor, nn

from writesae import TrainConfig, WriteSAE, WriteSAEConfig
from writesae.training import Trainer

N_ATOMS, K, BATCH = 2048, 32, 256
WARMUPS = 2


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
        """Mean over samples of |X - X_hat|^2."""
        scores = torch.einsum("nrk,bkv,nrv->bn", self.key_encoder, x, self.value_encoder) + self.bias
        values, indices = scores.topk(self.k, dim=-1)
        codes = torch.zeros_like(scores).scatter(-1, indices, values.relu())
        rebuilt = torch.einsum("bn,nrk,nrv->bkv", codes, self.key_atoms, self.value_atoms)
        return (x - rebuilt).square().sum((1, 2)).mean()


def steps_at(width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One training step of each side at d_k = d_v = width; raises `RuntimeError` when their losses differ."""
    generator = torch.Generator().manual_seed(width)
    key = nn.functional.normalize(torch.randn(BATCH, width, generator=generator), dim=-1)
    value = torch.randn(BATCH, width, generator=generator)
    sae = WriteSAE(WriteSAEConfig(d_k=width, d_v=width, n_atoms=N_ATOMS, k=K))
    sae.calibrate_(key, value)
    x = key[:, :, None] * (value * sae.input_scale)[:, None, :]
    dense = DenseBilinearSAE(sae)
    ours, theirs = float(sae.loss(key, value).loss.detach()), float(dense.loss(x).detach())
    if abs(ours - theirs) > 1e-4 * theirs:
        raise RuntimeError(f"the two sides do not compute the same loss at d = {width}: {ours} and {theirs}")
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3, fused=True)
    never = 10**9
    trainer = Trainer(sae, TrainConfig(steps=never, lr=1e-3, dead_after=never, resample_every=0, log_every=never))

    def dense_step() -> None:
        optimizer.zero_grad()
        dense.loss(x).backward()
        optimizer.step()

    return dense_step, lambda: trainer.advance(key, value)


def measure(width: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each side, and their ratio."""
    medians = median_seconds(dict(zip(("dense", "factored"), steps_at(width), strict=True)), repeats, WARMUPS)
    return {"d": width, **medians, "ratio": medians["dense"] / medians["factored"]}


def show(rows: list[dict[str, float]], where: dict[str, str | int], repeats: int) -> None:
    """Print the table and what it was measured on."""
    title = f"One training step on {BATCH} writes, {N_ATOMS:,} atoms, k = {K}: median of {repeats}"
    table = Table("d_k = d_v", "dense", "factored", "ratio", title=title)
    for row in rows:
        ms = [f"{row[side] * 1e3:,.1f} ms" for side in ("dense", "factored")]
        table.add_row(str(int(row["d"])), *ms, f"{row['ratio']:.0f}x")
    console = Console()
    console.print(table)
    print_machine(console, where)


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="values of d_k = d_v")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps per side and width")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice when left out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or min(arguments.widths) < 1:
        parser.error("--repeats and --widths must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [measure(width, arguments.repeats) for width in arguments.widths]
    where = machine()
    show(rows, where, arguments.repeats)
    if arguments.json:
        settings = {"n_atoms": N_ATOMS, "k": K, "batch": BATCH, "repeats": arguments.repeats}
        write_json(arguments.json, {"settings": settings, "machine": where, "steps": rows})


if __name__ == "__main__":
    main()
