"""What is added at the three install positions, many trials side by side: rank-1 writes, or steering vectors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_recurrent import ActivationEdit, WriteEdit
from hooked_recurrent.edits import Edit
from hooked_recurrent.edits.memory import Reading
from writesae.evaluation.installing.install_context import PLACES


@dataclass(frozen=True)
class Installs:
    """One write per row and position, key value^T, each row in a cell; `together` rows that follow each other are one trial."""

    cells: tuple[tuple[int, int], ...]
    """(layer, head) of every row."""
    key: Float[Tensor, "row place d_k"]
    """Key sides, of length 1."""
    value: Float[Tensor, "row place d_v"]
    """Value sides, which carry the norm."""
    together: int = 1
    """How many cells, each once, a trial writes into."""

    def __len__(self) -> int:
        return len(self.cells) // self.together

    @property
    def norms(self) -> Float[Tensor, "row place"]:
        """Frobenius norms of the writes."""
        return self.key.norm(dim=-1) * self.value.norm(dim=-1)

    @property
    def total_norms(self) -> Float[Tensor, " trial"]:
        """Root of the summed squares of a trial's norms, over its cells and positions."""
        return self.norms.reshape(len(self), -1).norm(dim=-1)

    def batched(self, first: int, reading: Reading, start: int = 0) -> list[Edit]:
        """All trials as edits of one batch, whose rows begin at `start`: one edit per cell."""
        edits: list[Edit] = []
        for layer, head in sorted(set(self.cells)):
            mine = torch.tensor([index for index, cell in enumerate(self.cells) if cell == (layer, head)])
            key, value = self.key[mine], self.value[mine]
            here = slice(first, first + PLACES)
            rows = mine // self.together + start
            edits.append(WriteEdit(layer, head, here, "add", key, value, batch=rows, reading=reading))
        return edits

    def single(self, first: int, reading: Reading) -> list[tuple[Edit, ...]]:
        """Every trial as an intervention of its own."""
        by_row = [
            tuple(
                WriteEdit(*cell, first + place, "add", key[place], value[place], reading=reading)
                for place in range(PLACES)
            )
            for cell, key, value in zip(self.cells, self.key, self.value, strict=True)
        ]
        starts = range(0, len(by_row), self.together)
        return [sum(by_row[start : start + self.together], start=()) for start in starts]


@dataclass(frozen=True)
class Steering:
    """One vector per trial and position, added to the residual stream behind the block of the trial's cell."""

    layers: tuple[int, ...]
    """The block of every trial."""
    vector: Float[Tensor, "trial place d_model"]
    """What is added."""

    def __len__(self) -> int:
        return len(self.layers)

    def scaled(self, factor: Float[Tensor, " trial"]) -> "Steering":
        """Every trial's vectors times its factor."""
        return Steering(self.layers, self.vector * factor.to(self.vector)[:, None, None])

    def batched(self, first: int, start: int = 0) -> list[Edit]:
        """All trials as edits of one batch, whose rows begin at `start`: one edit per layer."""
        edits: list[Edit] = []
        for layer in sorted(set(self.layers)):
            mine = torch.tensor([index for index, its in enumerate(self.layers) if its == layer])
            here = slice(first, first + PLACES)
            edits.append(ActivationEdit(_hook(layer), here, self.vector[mine], batch=mine + start, op="add"))
        return edits

    def single(self, first: int) -> list[tuple[Edit, ...]]:
        """Every trial as an intervention of its own."""
        here = slice(first, first + PLACES)
        return [
            (ActivationEdit(_hook(layer), here, vector, op="add"),)
            for layer, vector in zip(self.layers, self.vector, strict=True)
        ]


def _hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"
