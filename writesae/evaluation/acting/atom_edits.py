"""Atoms as edits of a memory, and which of them an experiment looks at.

Adding c A_i to the write at t and adding it to S_t are the same thing, since a write enters the state by addition; so an atom
kept as factors goes in as one further write per outer product, and a dense one as an edit of the state.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_recurrent import StateEdit, WriteEdit
from hooked_recurrent.edits import Edit, Position, Reading
from writesae.evaluation.firings import CellWrites
from writesae.sae.codes import Codes
from writesae.sae.write_sae import WriteSAE


@torch.no_grad()
def adding(
    sae: WriteSAE,
    atom: int,
    factor: float,
    *,
    layer: int,
    head: int,
    position: Position,
    reading: Reading = "in_recurrence",
    batch: int | None = None,
) -> tuple[Edit, ...]:
    """The edits that add factor x A_atom to the memory of a head at some positions; negative factors take it away.

    `reading` says whether the query of the position sees it already. `IndexError` for an atom that is not in the dictionary.
    """
    if not 0 <= atom < sae.config.n_atoms:
        raise IndexError(f"atom {atom} is outside this dictionary of {sae.config.n_atoms} atoms")
    if sae.config.decoder == "dense":
        matrix = (factor * dense_atom(sae, atom)).detach()
        return (StateEdit(layer, head, position, "add", matrix=matrix, batch=batch, reading=reading),)
    keys, values = sae.key_atoms[atom].detach(), factor * sae.value_atoms[atom].detach()
    return tuple(
        WriteEdit(layer, head, position, "add", key, value, batch=batch, reading=reading)
        for key, value in zip(keys, values, strict=True)
    )


@torch.no_grad()
def dense_atom(sae: WriteSAE, atom: int) -> Float[Tensor, "d_k d_v"]:
    """An atom as a matrix."""
    return sae.atom(atom).AB.detach()


def inside(codes: Codes, first: int, last: int) -> Bool[Tensor, "passage pos k"]:
    """Which entries of the codes of passages fire at positions first..last."""
    window = torch.zeros(codes.values.shape[:2], dtype=torch.bool, device=codes.values.device)
    window[:, first : last + 1] = True
    return (codes.values > 0) & window[..., None]


def chosen_atoms(
    writes: CellWrites,
    n_atoms: int,
    *,
    atoms: tuple[int, ...] | None,
    count: int,
    first: int,
    last: int,
    least: int = 2,
) -> list[int]:
    """The listed atoms in rising order, or the `count` atoms that fire most often at positions first..last.

    Raises:
        IndexError: a listed atom is not in the dictionary.
        ValueError: a listed atom fires in fewer than `least` passages, or no atom fires in that many. Halves of the passages,
            and intervals clustered by them, need two.
    """
    for atom in atoms or ():
        if not 0 <= atom < n_atoms:
            raise IndexError(f"atom {atom} is outside this dictionary of {n_atoms} atoms")
    passage, position, slot = inside(writes.codes, first, last).nonzero().unbind(1)
    fired = writes.codes.indices[passage, position, slot]
    firings = torch.bincount(fired, minlength=n_atoms)
    pairs = torch.unique(torch.stack([passage, fired], 1), dim=0)
    in_passages = torch.bincount(pairs[:, 1], minlength=n_atoms)
    if atoms is not None:
        for atom in atoms:
            if in_passages[atom] < least:
                raise ValueError(f"atom {atom} fires in {int(in_passages[atom])} passages; this test needs {least}")
        return sorted(set(atoms))
    able = torch.where(in_passages >= least, firings, 0)
    order = able.argsort(descending=True, stable=True)[:count]
    found = sorted(int(atom) for atom in order if able[atom] > 0)
    if not found:
        raise ValueError(f"no atom fires in {least} passages at positions {first} to {last}")
    return found
