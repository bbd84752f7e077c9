"""The directions of an install that need no gradient, at equal norm: the paper's with three key sides, and random ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.evaluation.firings import CellWrites
from writesae.evaluation.installing.install_context import PLACES, Context
from writesae.evaluation.installing.install_edits import Installs
from writesae.evaluation.installing.install_lambda import top_pairs
from writesae.sae.write_sae import WriteSAE

Cells = tuple[tuple[int, int], ...]
"""(layer, head) of every row; see `Installs`."""


def unit(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Every vector at length 1; zero stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)


def unembedding_values(
    model: HookedRecurrentModel, targets: Int[Tensor, " row"], cells: Cells
) -> Float[Tensor, "row d_v"]:
    """v_T* = W_O[h] W_U[T], of length 1: the paper's value side, the fixed direction of protocols 8 and 9.

    It passes over the gated norm between read and W_O, the layers above and the last norm.
    """
    rows = [
        model.blocks[layer].W_O[head].detach() @ model.W_U[:, token].detach()  # type: ignore[operator, index]
        for (layer, head), token in zip(cells, targets.tolist(), strict=True)
    ]
    return unit(torch.stack(rows))


def atom_keys(
    sae: WriteSAE, writes: CellWrites, passage: int, positions: slice | list[int]
) -> Float[Tensor, "place d_k"]:
    """The key side of the atom with the largest coefficient at each position; of several terms their top singular pair's."""
    indices, values = writes.codes.indices[passage, positions], writes.codes.values[passage, positions]
    atoms = indices.gather(-1, values.argmax(-1, keepdim=True))[:, 0]
    key, value = sae.key_atoms.detach()[atoms], sae.value_atoms.detach()[atoms]
    return unit(key[:, 0]) if key.shape[1] == 1 else top_pairs(key.mT @ value)[0]


def role_keys(context: Context, role: str, cells: Cells, later: int = 0) -> Float[Tensor, "row place d_k"]:
    """A role's vectors at the install positions (or `later` positions on), of length 1, at every row's cell."""
    here = slice(later, later + PLACES)
    return unit(torch.stack([context.roles[layer, role][here, head] for layer, head in cells]))


def fixed_directions(
    model: HookedRecurrentModel,
    context: Context,
    targets: Int[Tensor, " row"],
    cells: Cells,
    norms: Float[Tensor, "row place"],
    atoms: Float[Tensor, "place d_k"] | None,
    together: int = 1,
) -> dict[str, Installs]:
    """The paper's value side with the native key, the next position's query and (where given) an atom's key."""
    value = unembedding_values(model, targets, cells)[:, None] * norms[..., None]
    keys = {
        "fixed_native_key": role_keys(context, "write_key", cells),
        "fixed_next_query": role_keys(context, "query", cells, later=1),
    }
    if atoms is not None:
        keys["fixed_atom_key"] = atoms.to(value).expand(len(cells), -1, -1)
    return {name: Installs(cells, key.to(value), value, together) for name, key in keys.items()}


def random_directions(
    context: Context,
    cells: Cells,
    norms: Float[Tensor, "row place"],
    of_target: Int[Tensor, " trial"],
    seed: int,
    together: int = 1,
) -> dict[str, Installs]:
    """Gaussian directions of equal norm: both sides random, and a random value side under the native key.

    One draw per target, cell of a trial and position of the context, whatever the magnitude and which cell it is, so that
    trials that differ in these alone are paired.
    """
    d_k, d_v = (context.roles[cells[0][0], f"write_{side}"].shape[-1] for side in ("key", "value"))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + context.passage) * 1_000_003 + context.position)
    count = int(of_target.max()) + 1
    drawn = torch.randn(count, together, PLACES, d_k + 2 * d_v, generator=generator, dtype=torch.float64)
    rows = drawn[of_target.cpu()].flatten(0, 1)
    key, value, other = (unit(side).to(norms) for side in rows.split([d_k, d_v, d_v], dim=-1))
    native = role_keys(context, "write_key", cells).to(norms)
    return {
        "random": Installs(cells, key, value * norms[..., None], together),
        "random_value": Installs(cells, native, other * norms[..., None], together),
    }
