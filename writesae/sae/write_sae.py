"""WriteSAE: a sparse autoencoder whose atoms have the shape of what a recurrent memory stores (arXiv:2605.12770).

    codes    a = sparsify(z),  z_i = p_i^T X r_i + c_i            X: a write k v^T, or any matrix of its shape
    X_hat    = sum_i a_i A_i  (+ mean),  A_i = v_i w_i^T
    loss     = input_scale^2 * mean over samples of |X - X_hat|^2

Encoder, decoder and sparsifier are parts that combine freely (`encoders.py`, `atoms.py`, `activations.py`); what they are
trained on is any `Samples` (`samples.py`), which are known by their inner products. So one loss serves writes at the
cost of their factors, whole passages of states by running sums, vectors, and plain matrices; `dense_loss`, the last of
these, is the reference that the others are tested against, values and gradients.

Units. The size of a write differs by orders of magnitude between heads, so everything inside happens in scaled units,
where the mean squared norm of a training sample is 1 (`calibrate_` sets the scale), and one learning rate fits all
heads. Codes are handed out in RAW units: coefficient times atom is directly what one would put in a write's place. Inputs
are converted to the dtype of the dictionary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

import writesae.sae.storage as storage
from hooked_recurrent.config import check_device
from hooked_recurrent.display import OneLine
from writesae.config import WriteSAEConfig
from writesae.sae.activations import ACTIVATIONS, Choice
from writesae.sae.atoms import DECODERS
from writesae.sae.codes import Codes
from writesae.sae.encoders import ENCODERS, Scores
from writesae.sae.samples import Factored, Matrices, Samples
from writesae.sae.shown import ShownSAE

_SCORES_AT_ONCE = 1 << 24  # entries of one block of scores while encoding many samples: 64 MB of float32
_AMPLITUDE_SAMPLES = 2048  # samples from which the encoder's first amplitude is fitted
_MATRIX_AT_ONCE = 1 << 26  # entries of one block of half-contracted matrices on the dense path: 256 MB of float32


@dataclass(frozen=True, repr=False)
class LossOutput(OneLine):
    """What one evaluation of the loss gives; raw units are those of the samples, scaled units those of the loss."""

    loss: Float[Tensor, ""]
    """Mean squared error per sample in scaled units (mean over the Matryoshka prefixes, where there are some)."""
    penalty: Float[Tensor, ""]
    """What training adds for sparsity, weighted; zero where sparsity is counted out (topk, batch_topk)."""
    fvu: Float[Tensor, ""]
    """Fraction of variance unexplained: squared error over the variance of the calibration samples; 0 is perfect."""
    l0: Float[Tensor, ""]
    """Mean number of active atoms."""
    errors: Float[Tensor, " batch"]
    """Squared error of each sample in scaled units."""
    codes: Codes
    """Active atoms and coefficients, raw units."""
    scores: Scores
    """Scores of the whole dictionary in scaled units, without gradient."""


class WriteSAE(ShownSAE, nn.Module):
    """A dictionary of atoms over matrices [d_k, d_v]. See the module's docstring for the algebra.

    Buffers, all saved: `input_scale`, `input_variance` (variance of the calibration samples in scaled units),
    `steps_since_active` [n_atoms], and with `center` the `mean` [d_k, d_v] in raw units.
    `provenance` is a plain dictionary that travels with the weights: model, hook, head, layout, split, training,
    metrics. `scoring_dtype`, where set, is the narrower type in which the whole dictionary is scored to find the active
    atoms; all else stays in the dictionary's own type.
    """

    input_scale: Tensor
    input_variance: Tensor
    steps_since_active: Tensor
    mean: Tensor | None

    def __init__(self, config: WriteSAEConfig):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.activation = ACTIVATIONS[config.activation](config)
        self.decoder = DECODERS[config.decoder](config, generator)
        self.encoder = ENCODERS[config.encoder](config, self.decoder, self.activation.biased)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_variance", torch.ones(()))
        self.register_buffer("steps_since_active", torch.zeros(config.n_atoms, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(config.d_k, config.d_v) if config.center else None)
        self.scoring_dtype: torch.dtype | None = None
        self.provenance: dict[str, Any] = {"layout": "key_first"}

    # --- the atoms ---------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Type of the dictionary's numbers."""
        return self.input_scale.dtype

    @property
    def key_atoms(self) -> Float[Tensor, "n_atoms rank d_k"]:
        """Key-side factors v of the atoms; dense atoms have none, and raise `ValueError`."""
        self._needs_factors()
        return self.decoder.key_atoms

    @property
    def value_atoms(self) -> Float[Tensor, "n_atoms rank d_v"]:
        """Value-side factors w of the atoms; dense atoms have none, and raise `ValueError`."""
        self._needs_factors()
        return self.decoder.value_atoms

    def _needs_factors(self) -> None:
        if self.config.decoder == "dense":
            raise ValueError("the atoms of this dictionary are dense matrices and have no factors; see sae.atom(index)")

    def atom(self, index: int) -> FactoredMatrix:
        """Atom `index` as a FactoredMatrix [d_k, d_v]; an index outside the dictionary raises `IndexError`."""
        if not isinstance(index, int):
            raise TypeError(f"an atom is named by its number, got {index!r}")
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
        samples = self._factored(key, value)
        _require_finite("key and value", key, value)
        return self.encode_samples(samples).reshape(key.shape[:-1])

    def encode_matrix(self, x: Float[Tensor, "*batch d_k d_v"]) -> Codes:
        """Codes of any matrices [.., d_k, d_v]; for writes it equals `encode` of their factors, at a higher cost.

        Raises `ValueError` when the last two axes are not (d_k, d_v).
        """
        samples = self._matrices(x)
        _require_finite("the matrices", x)
        return self.encode_samples(samples).reshape(x.shape[:-2])

    def encode_samples(self, samples: Samples) -> Codes:
        """Codes of any samples, every row ordered by falling coefficient, by the rule of inference.

        Raises `ValueError` for samples of another width.
        """
        at_once = _SCORES_AT_ONCE // self.config.n_atoms
        if isinstance(samples, Matrices):
            at_once = _MATRIX_AT_ONCE // (self.config.n_atoms * self.config.rank * self.config.d_v)
        elif self.config.encoder == "linear":
            at_once = min(at_once, _MATRIX_AT_ONCE // (self.config.d_k * self.config.d_v))
        blocks = samples.blocks(max(1, at_once)) if len(samples) else [samples]
        return Codes.concatenate([self._encode(self._scaled(block), training=False)[0] for block in blocks]).over(
            self.input_scale
        )

    def decode(self, codes: Codes) -> Float[Tensor, "*batch d_k d_v"]:
        """The matrices sum_i a_i A_i (+ mean), raw units, built from the active atoms only.

        Raises `TypeError` for what is no `Codes`, `IndexError` for an atom outside the dictionary.
        """
        if not isinstance(codes, Codes):
            raise TypeError(f"decode takes the Codes that encode gives, got {type(codes).__name__}")
        outside = codes.indices[(codes.indices < 0) | (codes.indices >= self.config.n_atoms)]
        if len(outside):
            raise IndexError(f"atom {int(outside[0])} is outside this dictionary of {self.config.n_atoms} atoms")
        k = codes.indices.shape[-1]
        x = self.decoder.decode(codes.indices.reshape(-1, k), codes.values.reshape(-1, k))
        x = x if self.mean is None else x + self.mean
        return x.reshape(*codes.indices.shape[:-1], *x.shape[1:])

    def forward(self, x: Float[Tensor, "*batch d_k d_v"]) -> Float[Tensor, "*batch d_k d_v"]:
        """Reconstruction of any matrices: decode(encode_matrix(x))."""
        return self.decode(self.encode_matrix(x))

    # --- losses ------------------------------------------------------------------------------------------------

    def loss(self, samples: Samples | Float[Tensor, "batch d_k"], value: Tensor | None = None) -> LossOutput:
        """Reconstruction loss of samples, or of the writes key value^T given as two tensors, at their own cost.

        In training mode (`sae.train()`) atoms are chosen as training does, else by the rule of inference. Raises `ValueError`
        for samples of another width.
        """
        if isinstance(samples, Tensor):
            if value is None:
                raise ValueError("loss needs samples, or the keys and the values of writes; got keys alone")
            samples = self._factored(samples, value)
        samples = self._scaled(samples)
        codes, choice, chosen, scores = self._encode(samples, self.training)
        errors = self._errors(samples, codes)
        penalty = self.activation.penalty(chosen, choice)
        gates = self.activation.gates(chosen, choice)
        total = errors.new_zeros(()) if penalty is None else penalty
        if gates is not None:  # the gate must be able to rebuild the input by itself, with atoms that do not follow it
            total = total + self._frozen_errors(samples, Codes(choice.indices, gates)).mean()
        own = errors[:, -1].detach()
        l0 = codes.l0.to(own.dtype).mean()
        raw = codes.detach().over(self.input_scale)
        return LossOutput(errors.mean(), total, own.mean() / self.input_variance, l0, own, raw, scores)

    def dense_loss(self, x: Float[Tensor, "batch d_k d_v"]) -> LossOutput:
        """The same loss by its definition, on matrices: the reference, and the path of matrices without factors."""
        return self.loss(self._matrices(x))

    def scores_at(self, indices: Int[Tensor, "batch k"], samples: Samples, scores: Scores) -> Float[Tensor, "batch k"]:
        """Scores of chosen atoms in scaled units, with gradients; `scores` are those of `loss(samples)`."""
        return self.encoder.at(indices, self._scaled(samples), scores)

    def residual_errors(self, samples: Samples, output: LossOutput, more: Codes) -> Float[Tensor, " batch"]:
        """|R - sum_i b_i A_i|^2 of every sample, scaled units, where R is what `output` left over, held fixed.

        `more` are codes in scaled units. |R|^2 is known, and <R, A_j> = <X, A_j> - <X_hat, A_j>.
        """
        samples, first = self._scaled(samples), output.codes.times(self.input_scale)
        left_over = self.decoder.inner_at(samples, more.indices)
        left_over = left_over - self.decoder.inner_with_code(more.indices, first.indices, first.values)
        if self.mean is not None:
            left_over = left_over - self.decoder.inner_with_matrix(self.mean * self.input_scale)[more.indices]
        crossed = (more.values * left_over).sum(1)
        return output.errors - 2 * crossed + self.decoder.squared_norms_of(more.indices, more.values)

    def _errors(self, samples: Samples, codes: Codes) -> Float[Tensor, "batch level"]:
        """Squared errors of every Matryoshka prefix, the whole dictionary last; all in scaled units."""
        levels = [codes.values * (codes.indices < size) for size in self.config.matryoshka]
        coefficients = torch.stack([*levels, codes.values], dim=1)
        errors = self.decoder.squared_errors(samples, codes.indices, coefficients)
        if self.mean is None:
            return errors
        # |R - M|^2 = |R|^2 - 2 <R, M> + |M|^2, and <R, M> = <X, M> - sum_i a_i <A_i, M>: one more inner product.
        mean = self.mean * self.input_scale
        of_atoms = self.decoder.inner_with_matrix(mean)[codes.indices]
        inner = samples.inner_with_matrix(mean)[:, None] - (coefficients * of_atoms[:, None]).sum(2)
        return errors - 2 * inner + mean.square().sum()

    def _frozen_errors(self, samples: Samples, codes: Codes) -> Float[Tensor, "batch level"]:
        """The same errors, by atoms that get no gradient."""
        parameters = list(self.decoder.parameters())
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            return self._errors(samples, codes)
        finally:
            for parameter, own in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(own)

    # --- calibration and files ---------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate_(self, samples: Samples | Float[Tensor, "batch d_k"], value: Tensor | None = None) -> None:
        """Measure the scale, the variance and (with `center`) the mean on these samples, once, before training; with `start` =
        "samples" also make each atom one of them.

        The encoder is then amplified by the one factor that makes its reconstructions of these samples best: the k most
        excited of many random atoms overlap, and together they may overshoot by far.

        Raises `ValueError` when all samples are zero.
        """
        if isinstance(samples, Tensor):
            if value is None:
                raise ValueError("calibrate_ needs samples, or the keys and the values of writes; got keys alone")
            samples = self._factored(samples, value)
        if not len(samples):
            raise ValueError("calibrate_ needs one sample at least, got none")
        power = samples.to(dtype=torch.float64).squared_norms().mean()
        if not torch.isfinite(power):
            raise ValueError("the samples given to calibrate_ hold NaN or Inf")
        if not power > 0:
            raise ValueError("every write given to calibrate_ is zero: this head writes nothing on these tokens")
        mean = samples.mean()
        if self.config.start == "samples":
            self._start_from_(samples.to(dtype=self.dtype))
        self.input_scale.copy_(power.rsqrt())
        self.input_variance.copy_(((power - mean.square().sum()) / power).clamp_min(1e-12))
        if self.mean is not None:
            self.mean.copy_(mean)
            offsets = -self.encoder.of_matrix(self.mean * self.input_scale)
            if self.encoder.bias is not None:
                self.encoder.bias.copy_(offsets)
            self.activation.absorb_(offsets)
        best = self._best_amplitude(self._scaled(next(iter(samples.blocks(_AMPLITUDE_SAMPLES)))))
        if best > 0 and self.encoder.amplify_(best):
            if self.encoder.bias is not None:
                self.encoder.bias.mul_(best)
            self.activation.amplify_(best)

    def _start_from_(self, samples: Samples) -> None:
        """Make atoms of samples drawn without replacement, encoder and decoder alike; where there are too few, the last atoms
        stay random.
        """
        generator = torch.Generator().manual_seed(self.config.seed)
        there = (samples.squared_norms() > 0).nonzero().squeeze(1).cpu()
        drawn = there[torch.randperm(len(there), generator=generator)[: self.config.n_atoms]].to(samples.device)
        chosen, atoms = samples.take(drawn), torch.arange(len(drawn), device=samples.device)
        leading = chosen.leading(atoms)
        self.decoder.reset_(atoms, chosen, leading)
        self.decoder.normalise_()
        self.encoder.reset_(atoms, chosen, leading, atoms[:0], 1.0)

    def _best_amplitude(self, samples: Samples) -> Tensor:
        """The b that minimises sum |X - mean - b sum_i a_i A_i|^2: inner products over squared norms."""
        codes = self._encode(samples, training=True)[0]
        inner = (codes.values * self.decoder.inner_at(samples, codes.indices)).sum()
        if self.mean is not None:
            of_atoms = self.decoder.inner_with_matrix(self.mean * self.input_scale)[codes.indices]
            inner = inner - (codes.values * of_atoms).sum()
        squared = self.decoder.squared_norms_of(codes.indices, codes.values).sum()
        return inner / squared.clamp_min(torch.finfo(squared.dtype).tiny)

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
        device = check_device(device)
        tensors, header = storage.read_folder(Path(path))
        try:
            sae = cls(WriteSAEConfig.from_dict(header["config"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the configuration of {str(path)!r} is not that of a WriteSAE: {error}") from None
        storage.check_tensors(Path(path), tensors, sae.state_dict())
        dtype = tensors["input_scale"].dtype
        sae.to(dtype).load_state_dict(tensors)
        sae.provenance = header["provenance"]
        return sae.to(device).eval()

    # --- inside ------------------------------------------------------------------------------------------------

    def _encode(self, samples: Samples, training: bool) -> tuple[Codes, Choice, Tensor, Scores]:
        """Codes of scaled samples in scaled units, with what chose them."""
        with torch.autocast(samples.device.type, self.scoring_dtype, enabled=self.scoring_dtype is not None):
            scores = self.encoder.project(samples)
        choice = self.activation.select(scores.scores, training)
        chosen = self.encoder.at(choice.indices, samples, scores)
        return Codes(choice.indices, self.activation.apply(chosen, choice)), choice, chosen, scores

    def _scaled(self, samples: Samples) -> Samples:
        if (samples.d_k, samples.d_v) != (self.config.d_k, self.config.d_v):
            came, expected = (samples.d_k, samples.d_v), (self.config.d_k, self.config.d_v)
            raise ValueError(f"the samples are matrices of (d_k, d_v) = {came}, this dictionary expects {expected}")
        return samples.to(dtype=self.dtype).scaled(self.input_scale)

    def _factored(self, key: Tensor, value: Tensor) -> Factored:
        for name, tensor, width in (("key", key, self.config.d_k), ("value", value, self.config.d_v)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor [.., {width}], got {type(tensor).__name__}")
            if tensor.ndim == 0 or tensor.shape[-1] != width:
                raise ValueError(f"{name} must end in d_{name[0]}={width}, got shape {tuple(tensor.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            came = f"{tuple(key.shape[:-1])} and {tuple(value.shape[:-1])}"
            raise ValueError(f"key and value must have the same leading axes, got {came}")
        count = key.shape[:-1].numel()  # a reshape to -1 rows could not tell how many rows nothing has
        return Factored(key.reshape(count, key.shape[-1]), value.reshape(count, value.shape[-1])).to(dtype=self.dtype)

    def _matrices(self, x: Tensor) -> Matrices:
        if not isinstance(x, Tensor):
            raise TypeError(f"matrices must be a tensor [.., d_k, d_v], got {type(x).__name__}")
        expected = (self.config.d_k, self.config.d_v)
        if tuple(x.shape[-2:]) != expected:
            hint = " (transposed?)" if tuple(x.shape[-2:]) == expected[::-1] else ""
            raise ValueError(f"matrices must end in (d_k, d_v) = {expected}, got shape {tuple(x.shape)}{hint}")
        return Matrices(x.reshape(x.shape[:-2].numel(), *expected).to(self.dtype))

    # --- the hub (writesae/interop/hub.py) ------------------------------------------------------------------------

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, **more: Any
    ) -> str:
        """Upload the dictionary with a generated card to "owner/name"; `writesae.interop.hub.push` has the details."""
        from writesae.interop.hub import push

        return push(self, repo_id, private=private, revision=revision, **more)

    @classmethod
    def from_pretrained(cls, repo_id_or_folder: str | Path, **where: Any) -> "WriteSAE":
        """A dictionary of the hub or of a folder: `subfolder`, `revision`, `token` as in `writesae.interop.hub.fetch`."""
        from writesae.interop.hub import fetch

        return cls.load(fetch(repo_id_or_folder, **where))


def _require_finite(what: str, *tensors: Tensor) -> None:
    """Raise `ValueError` for NaN or Inf, which would choose atoms at random."""
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ValueError(f"{what} must be finite, got NaN or Inf")
