"""WriteSAE: a sparse autoencoder whose atoms have the shape of what a recurrent memory stores (arXiv:2605.12770).

    codes    a = sparsify(z),  z_i = p_i^T X r_i + c_i            X: a write k v^T, or any matrix of its shape
    X_hat    = sum_i a_i A_i  (+ mean),  A_i = v_i w_i^T
    loss     = input_scale^2 * mean over samples of |X - X_hat|^2

There are two ways to the same numbers. `loss` takes a write as its factors and never forms a d_k x d_v matrix
(`factored.py` has the algebra); `dense_loss` takes the matrix and follows the formulas above literally. The second is
the reference that the first is tested against, values and gradients.

Units. The size of a write differs by orders of magnitude between heads, so the loss is measured in scaled units,
where the mean squared norm of a training write is 1 (`calibrate_` sets the scale), and one learning rate fits all
heads. Codes are in RAW units: coefficient times atom is directly what one would put in a write's place. Inputs are
converted to the dtype of the dictionary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

import writesae.sae.storage as storage
from writesae.config import WriteSAEConfig
from writesae.sae.activations import ACTIVATIONS
from writesae.sae.atoms import DECODERS
from writesae.sae.codes import Codes
from writesae.sae.encoders import ENCODERS, Projections
from writesae.sae.factored import inner_with_sum, squared_norm_of_sum

_SCORES_AT_ONCE = 1 << 24  # entries of one block of scores while encoding many samples: 64 MB of float32
_AMPLITUDE_WRITES = 2048  # writes from which the encoder's first amplitude is fitted
_MATRIX_AT_ONCE = 1 << 26  # entries of one block of half-contracted matrices on the dense path: 256 MB of float32


@dataclass(frozen=True)
class Residual:
    """X - X_hat of every sample as a sum of outer products, sum_j coefficients_j left_j right_j^T; minus the mean, if any."""

    coefficients: Float[Tensor, "batch term"]
    """1 for the write itself, then -a_i for every active atom's terms."""
    left: Float[Tensor, "batch term d_k"]
    """The write's key, then the key factors of the atoms."""
    right: Float[Tensor, "batch term d_v"]
    """The write's value, then the value factors of the atoms."""


@dataclass(frozen=True)
class LossOutput:
    """What one evaluation of the loss gives; raw units are those of the writes, scaled units those of the loss."""

    loss: Float[Tensor, ""]
    """Mean squared error per sample in scaled units; this is what training lowers."""
    fvu: Float[Tensor, ""]
    """Fraction of variance unexplained: loss over the variance of the calibration writes; 0 is perfect, 1 their mean."""
    l0: Float[Tensor, ""]
    """Mean number of active atoms."""
    errors: Float[Tensor, " batch"]
    """Squared error of each sample in scaled units."""
    codes: Codes
    """Active atoms and coefficients, raw units."""
    residual: Residual | None = None
    """What is left of each write, as factors; None on the dense path."""
    projections: Projections | None = None
    """Scores of the whole dictionary without gradient; None on the dense path."""


class WriteSAE(nn.Module):
    """A dictionary of rank-1 (or rank-r) atoms over matrices [d_k, d_v]. See the module's docstring for the algebra.

    Buffers, all saved: `input_scale`, `input_variance` (variance of the calibration writes in scaled units),
    `steps_since_active` [n_atoms], and with `center` the `mean` [d_k, d_v] in raw units.
    `provenance` is a plain dictionary that travels with the weights: model, hook, head, layout, split, training,
    metrics.
    """

    input_scale: Tensor
    input_variance: Tensor
    steps_since_active: Tensor
    mean: Tensor | None

    def __init__(self, config: WriteSAEConfig):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.decoder = DECODERS[config.decoder](config, generator)
        self.encoder = ENCODERS[config.encoder](config, self.decoder.key_atoms, self.decoder.value_atoms)
        self.activation = ACTIVATIONS[config.activation](config)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_variance", torch.ones(()))
        self.register_buffer("steps_since_active", torch.zeros(config.n_atoms, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(config.d_k, config.d_v) if config.center else None)
        self.provenance: dict[str, Any] = {"layout": "key_first"}

    # --- the atoms ---------------------------------------------------------------------------------------------

    @property
    def key_atoms(self) -> Float[Tensor, "n_atoms rank d_k"]:
        """Key-side factors v of the atoms."""
        return self.decoder.key_atoms

    @property
    def value_atoms(self) -> Float[Tensor, "n_atoms rank d_v"]:
        """Value-side factors w of the atoms."""
        return self.decoder.value_atoms

    def atom(self, index: int) -> FactoredMatrix:
        """Atom `index` as a FactoredMatrix [d_k, d_v]; an index outside the dictionary raises `IndexError`."""
        if not -self.config.n_atoms <= index < self.config.n_atoms:
            raise IndexError(f"atom {index} is outside this dictionary of {self.config.n_atoms} atoms")
        return self.decoder.matrix(index)

    def atom_norms(self) -> Float[Tensor, " n_atoms"]:
        """Frobenius norms of the atoms, recomputed now; training keeps them at 1, other checkpoints may not."""
        return self.decoder.norms()

    # --- codes -------------------------------------------------------------------------------------------------

    def encode(self, key: Float[Tensor, "*batch d_k"], value: Float[Tensor, "*same d_v"]) -> Codes:
        """Codes of the writes key value^T, without forming them. Any leading axes, the same for both; differentiable.

        Raises `ValueError` when a width or the leading axes do not fit.
        """
        key, value = self._checked_factors(key, value)
        rows = max(1, _SCORES_AT_ONCE // self.config.n_atoms)
        flat = zip(self._blocks(key, 1, rows), self._blocks(value, 1, rows), strict=True)
        return self._gather([self._encode(*block)[0] for block in flat], key.shape[:-1])

    def encode_matrix(self, x: Float[Tensor, "*batch d_k d_v"]) -> Codes:
        """Codes of any matrices [.., d_k, d_v]; for writes it equals `encode` of their factors, at a higher cost.

        Raises `ValueError` when the last two axes are not (d_k, d_v).
        """
        x = self._checked_matrix(x)
        rows = max(1, _MATRIX_AT_ONCE // (self.config.n_atoms * self.config.rank * self.config.d_v))
        return self._gather([self._encode_matrix(block) for block in self._blocks(x, 2, rows)], x.shape[:-2])

    def decode(self, codes: Codes) -> Float[Tensor, "*batch d_k d_v"]:
        """The matrices sum_i a_i A_i (+ mean), raw units, built from the active atoms only."""
        k = codes.indices.shape[-1]
        x = self.decoder.decode(codes.indices.reshape(-1, k), codes.values.reshape(-1, k))
        x = x if self.mean is None else x + self.mean
        return x.reshape(*codes.indices.shape[:-1], *x.shape[1:])

    def forward(self, x: Float[Tensor, "*batch d_k d_v"]) -> Float[Tensor, "*batch d_k d_v"]:
        """Reconstruction of any matrices: decode(encode_matrix(x))."""
        return self.decode(self.encode_matrix(x))

    # --- losses ------------------------------------------------------------------------------------------------

    def loss(self, key: Float[Tensor, "batch d_k"], value: Float[Tensor, "batch d_v"]) -> LossOutput:
        """Reconstruction loss of the writes key value^T at factor cost, forward and backward."""
        key, value = self._checked_factors(key, value)
        codes, projections, residual = self._take_apart(key, value)
        squared = squared_norm_of_sum(residual.coefficients[:, None], residual.left, residual.right).squeeze(1)
        if self.mean is not None:
            # |R - M|^2 = |R|^2 - 2 <R, M> + |M|^2, and <R, M> = k^T M v - sum_i a_i <A_i, M>: one more inner product.
            of_atoms = self.decoder.inner_with_matrix(self.mean)[codes.indices]
            inner = ((key @ self.mean) * value).sum(-1) - (codes.values * of_atoms).sum(-1)
            squared = squared - 2 * inner + self.mean.square().sum()
        return self._output(squared, codes, residual, projections)

    def dense_loss(self, x: Float[Tensor, "batch d_k d_v"]) -> LossOutput:
        """The same loss by its definition, on matrices: the reference, and the path of matrices without factors."""
        x = self._checked_matrix(x)
        codes = self._encode_matrix(x)
        return self._output((x - self.decode(codes)).square().sum((1, 2)), codes)

    def _output(self, squared, codes, residual=None, projections=None) -> LossOutput:
        errors = squared * self.input_scale**2
        loss = errors.mean()
        l0 = codes.l0.to(loss.dtype).mean()
        fvu = loss.detach() / self.input_variance
        return LossOutput(loss, fvu, l0, errors.detach(), codes.detach(), residual, projections)

    # --- calibration and files ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_(self, key: Float[Tensor, "batch d_k"], value: Float[Tensor, "batch d_v"]) -> None:
        """Measure the scale, the variance and (with `center`) the mean on these writes, once, before training.

        The encoder is then amplified by the one factor that makes its reconstructions of these writes best: the k most
        excited of many random atoms overlap, and together they may overshoot by far.

        Raises `ValueError` when all writes are zero.
        """
        key, value = self._checked_factors(key, value)
        key64, value64 = key.double(), value.double()
        power = (key64.square().sum(-1) * value64.square().sum(-1)).mean()
        if not power > 0:
            raise ValueError("every write given to calibrate_ is zero: this head writes nothing on these tokens")
        mean = key64.T @ value64 / len(key)
        self.input_scale.copy_(power.rsqrt())
        self.input_variance.copy_(((power - mean.square().sum()) / power).clamp_min(1e-12))
        if self.mean is not None:
            self.mean.copy_(mean)
            self.encoder.absorb_mean_(self.mean, self.input_scale)
        best = self._best_amplitude(key[:_AMPLITUDE_WRITES], value[:_AMPLITUDE_WRITES])
        if best > 0:
            self.encoder.amplify_(best)

    def save(self, path: str | Path) -> Path:
        """Write the folder `path`: sae.safetensors and config.json, each atomically; returns the folder."""
        header = {"config": self.config.to_dict(), "provenance": self.provenance}
        return storage.write_folder(Path(path), self.state_dict(), header)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "WriteSAE":
        """Read a folder written by `save`.

        Raises `ValueError` with one sentence for a missing or truncated file, an unknown format version or config key,
        missing or surplus tensors, wrong shapes, and tensors that hold NaN or infinity.
        """
        tensors, header = storage.read_folder(Path(path))
        try:
            sae = cls(WriteSAEConfig.from_dict(header["config"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the configuration of {str(path)!r} is not that of a WriteSAE: {error}") from None
        storage.check_tensors(Path(path), tensors, sae.state_dict())
        dtype = tensors["decoder.key_atoms"].dtype
        sae.to(dtype).load_state_dict(tensors)
        sae.provenance = header["provenance"]
        return sae.to(device)

    def _best_amplitude(self, key: Tensor, value: Tensor) -> Tensor:
        """The b that minimises sum |X - mean - b sum_i a_i A_i|^2: inner products over squared norms."""
        codes, _, residual = self._take_apart(key, value)
        atoms, left, right = -residual.coefficients[:, 1:], residual.left[:, 1:], residual.right[:, 1:]
        inner = (atoms * inner_with_sum(left, right, torch.ones_like(key[:, :1]), key[:, None], value[:, None])).sum()
        if self.mean is not None:
            inner = inner - (codes.values * self.decoder.inner_with_matrix(self.mean)[codes.indices]).sum()
        squared = squared_norm_of_sum(atoms[:, None], left, right).sum()
        return inner / squared.clamp_min(torch.finfo(squared.dtype).tiny)

    # --- inside ------------------------------------------------------------------------------------------------

    def _take_apart(self, key: Tensor, value: Tensor) -> tuple[Codes, Projections, Residual]:
        """Encode the writes and list what is left of them, as factors."""
        codes, projections = self._encode(key, value)
        key_rows, value_rows = self.decoder.factors_at(codes.indices)
        minus_atoms = -self.decoder.per_term(codes.values)
        residual = Residual(
            torch.cat([torch.ones_like(minus_atoms[:, :1]), minus_atoms], dim=1),
            torch.cat([key[:, None], key_rows], dim=1),
            torch.cat([value[:, None], value_rows], dim=1),
        )
        return codes, projections, residual

    def _encode(self, key: Tensor, value: Tensor) -> tuple[Codes, Projections]:
        bias_scale = 1 / self.input_scale
        projections = self.encoder.project(key, value, bias_scale)
        indices = self.activation.select(projections.scores)
        chosen = self.encoder.at(indices, key, value, projections, bias_scale)
        return Codes(indices, self.activation.apply(chosen, indices)), projections

    def _encode_matrix(self, x: Tensor) -> Codes:
        scores = self.encoder.scores_of_matrix(x, 1 / self.input_scale)
        indices = self.activation.select(scores)
        return Codes(indices, self.activation.apply(scores.gather(1, indices), indices))

    @staticmethod
    def _blocks(x: Tensor, own_axes: int, rows: int) -> Iterator[Tensor]:
        """`x` with its leading axes flattened, `rows` samples at a time; at least one block, which may be empty."""
        flat = x.reshape(-1, *x.shape[x.ndim - own_axes :]) if x.numel() else x.new_zeros(0, *x.shape[-own_axes:])
        return iter(flat.split(rows)) if len(flat) else iter([flat])

    @staticmethod
    def _gather(blocks: list[Codes], leading: torch.Size) -> Codes:
        """The blocks in one, every row ordered by falling coefficient, with the leading axes restored."""
        indices: Int[Tensor, "rows k"] = torch.cat([block.indices for block in blocks])
        values, order = torch.cat([block.values for block in blocks]).sort(dim=-1, descending=True, stable=True)
        shape = (*leading, values.shape[-1])
        return Codes(indices.gather(-1, order).reshape(shape), values.reshape(shape))

    def _checked_factors(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for name, tensor, width in (("key", key, self.config.d_k), ("value", value, self.config.d_v)):
            if tensor.ndim == 0 or tensor.shape[-1] != width:
                raise ValueError(f"{name} must end in d_{name[0]}={width}, got shape {tuple(tensor.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            came = f"{tuple(key.shape[:-1])} and {tuple(value.shape[:-1])}"
            raise ValueError(f"key and value must have the same leading axes, got {came}")
        return key.to(self.key_atoms.dtype), value.to(self.key_atoms.dtype)

    def _checked_matrix(self, x: Tensor) -> Tensor:
        expected = (self.config.d_k, self.config.d_v)
        if tuple(x.shape[-2:]) != expected:
            hint = " (transposed?)" if tuple(x.shape[-2:]) == expected[::-1] else ""
            raise ValueError(f"matrices must end in (d_k, d_v) = {expected}, got shape {tuple(x.shape)}{hint}")
        return x.to(self.key_atoms.dtype)
