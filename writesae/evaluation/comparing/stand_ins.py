"""What other dictionaries, and simpler things than dictionaries, would put in the place of a write.

A replacement test is made at the firings of one dictionary. Whatever else is to be compared at the very same firings says here
what it would put there, as a function from the firing to a matrix (the `others` of the replacement test):

    strongest       the atom with the largest coefficient in another dictionary's code of that token; of an atom that is no
                    outer product, as one asks, all of it or its leading one sigma_1 u_1 v_1^T
    reconstructed   the leading outer product of everything the dictionary's code rebuilds: FlatSAE + SVD
    components      the leading outer product of what the first principal components of the writes rebuild (scikit-learn)
    one_for_all     the one outer product that rebuilds the writes of the cell best, by its projection on each
    by_token        the leading outer product of the mean write of the same token in other text: no dictionary, a table

`native_norm` brings any of them to the native write's norm. All are taken from text that is not tested on.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from sklearn.decomposition import PCA
from torch import Tensor

from writesae.evaluation.firings import CellWrites, Firing
from writesae.evaluation.low_rank import LowRank
from writesae.evaluation.replacing.substitutes import atom_of
from writesae.sae.write_sae import WriteSAE
from writesae.stream.corpus import Passages

StandIn = Callable[[Firing], LowRank]
TrainText = Int[Tensor, "train_passage train_pos"] | Passages
"""Text that something is trained on, beside other text that it is tested on."""
_ROUNDS = 50  # of the alternation that finds the best outer product; it gains nothing long before


def leading(matrix: Float[Tensor, "d_k d_v"]) -> LowRank:
    """sigma_1 u_1 v_1^T, the outer product nearest to a matrix, in the matrix's dtype; found in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return LowRank((u[:, :1].T * s[0]).to(matrix), vh[:1].to(matrix))


def native_norm(stand_in: StandIn, writes: CellWrites) -> StandIn:
    """The same at the Frobenius norm of the native write; zero stays zero."""
    return lambda firing: stand_in(firing).at_norm(float(writes.norms[firing.passage, firing.position]))


def strongest(sae: WriteSAE, writes: CellWrites, *, whole: bool = True) -> StandIn:
    """The atom with the largest coefficient, times it; with `whole` False its leading outer product. `writes` are of `sae`."""

    def stand_in(firing: Firing) -> LowRank:
        values = writes.codes.values[firing.passage, firing.position]
        slot = int(values.argmax())
        atom = atom_of(sae, int(writes.codes.indices[firing.passage, firing.position, slot]))
        if not whole and len(atom.key) > 1:
            atom = leading(atom.key.T @ atom.value)
        return atom.times(float(values[slot]))

    return stand_in


def reconstructed(sae: WriteSAE, writes: CellWrites) -> StandIn:
    """The leading outer product of decode(code); `writes` are of `sae`."""

    def stand_in(firing: Firing) -> LowRank:
        here = type(writes.codes)(
            writes.codes.indices[firing.passage, firing.position][None],
            writes.codes.values[firing.passage, firing.position][None],
        )
        return leading(sae.decode(here)[0].detach())

    return stand_in


def components(fitted: PCA, writes: CellWrites) -> StandIn:
    """The leading outer product of what a PCA of flattened writes rebuilds of the native write."""

    def stand_in(firing: Firing) -> LowRank:
        native = writes.key[firing.passage, firing.position][:, None] * writes.value[firing.passage, firing.position]
        rebuilt = fitted.inverse_transform(fitted.transform(native.reshape(1, -1).double().cpu().numpy()))
        return leading(torch.from_numpy(rebuilt).reshape(native.shape).to(native))

    return stand_in


def principal_components(
    key: Float[Tensor, "write d_k"], value: Float[Tensor, "write d_v"], count: int, seed: int
) -> PCA:
    """PCA of writes as flat vectors, centred as PCA is; at most as many components as the writes have."""
    flat = (key[:, :, None] * value[:, None, :]).flatten(1).double().cpu().numpy()
    return PCA(n_components=min(count, *flat.shape), svd_solver="randomized", random_state=seed).fit(flat)


def best_outer_product(key: Float[Tensor, "write d_k"], value: Float[Tensor, "write d_v"]) -> LowRank:
    """The unit u w^T with the largest sum of squared inner products with the writes: what one atom alone can explain.

    Each side is the leading eigenvector for the other side held fixed, in turns, from the leading vectors of both sides; every
    turn explains at least as much as the one before.
    """
    k, v = key.double(), value.double()
    left = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", v.square().sum(1), k, k)).eigenvectors[:, -1]
    right = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", (k @ left).square(), v, v)).eigenvectors[:, -1]
    for _ in range(_ROUNDS):
        left = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", (v @ right).square(), k, k)).eigenvectors[:, -1]
        right = torch.linalg.eigh(torch.einsum("n,ni,nj->ij", (k @ left).square(), v, v)).eigenvectors[:, -1]
    return LowRank(left[None].to(key), right[None].to(value))


def one_for_all(best: LowRank, writes: CellWrites) -> StandIn:
    """A fixed matrix of unit norm, times its inner product with the native write."""

    def stand_in(firing: Firing) -> LowRank:
        return best.times(writes.native(firing.passage, firing.position).inner(best))

    return stand_in


def by_token(
    key: Float[Tensor, "write d_k"],
    value: Float[Tensor, "write d_v"],
    at: Int[Tensor, " write"],
    tokens: Int[Tensor, "passage pos"],
) -> StandIn:
    """The leading outer product of the mean of the writes (key, value) that were made at the same token as the firing.

    `at` says at which token each write was made, `tokens` the text that is tested. A token that was never met stands for zero.
    """
    kept: dict[int, LowRank] = {}

    def stand_in(firing: Firing) -> LowRank:
        token = int(tokens[firing.passage, firing.position])
        if token not in kept:
            mine = at == token
            mean = key[mine].double().T @ value[mine].double() / mine.sum().clamp_min(1)
            kept[token] = leading(mean.to(key))
        return kept[token]

    return stand_in
