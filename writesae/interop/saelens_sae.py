"""The architecture "writesae" of SAELens: a WriteSAE behind SAELens's interface. Importing this file registers it.

Its weights on disk are the factors. SAELens's tools read and multiply whole matrices (`W_enc`, `W_dec`), so these are written
out when they are asked for, and encoding and decoding cost here what they cost for a flat dictionary of this size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import register_sae_class
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from writesae.config import WriteSAEConfig
from writesae.interop.flattened import Flat, flat
from writesae.sae.activations import GATE_TEMPERATURE
from writesae.sae.write_sae import WriteSAE

NAME = "writesae"


@dataclass
class FactoredSAEConfig(SAEConfig):
    """SAELens's fields, and ours."""

    metadata: Any = field(default_factory=SAEMetadata)
    """SAELens's record; its `from_dict` hands in a dict first and puts the record there after."""
    writesae: dict[str, Any] = field(default_factory=dict)
    """The fields of the `WriteSAEConfig`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the dictionary comes from."""

    @classmethod
    def architecture(cls) -> str:
        """The name in SAELens's registry."""
        return NAME


class FactoredSAE(SAE[FactoredSAEConfig]):
    """A WriteSAE over flattened matrices [..., d_k * d_v], key-first, row after row; `dictionary` is the WriteSAE."""

    dictionary: WriteSAE

    @classmethod
    def from_writesae(cls, sae: WriteSAE, common: dict[str, Any]) -> "FactoredSAE":
        """Wrap a copy of a dictionary; `common` are the fields of SAELens's config."""
        ours = {
            name: list(value) if isinstance(value, tuple) else value for name, value in sae.config.to_dict().items()
        }
        result = cls(FactoredSAEConfig(**common, writesae=ours, provenance=dict(sae.provenance)))
        result.dictionary.load_state_dict(sae.state_dict())
        return result

    def to_writesae(self) -> WriteSAE:
        """A copy of the dictionary."""
        sae = WriteSAE(self.dictionary.config).to(self.dtype)
        sae.load_state_dict(self.dictionary.state_dict())
        sae.provenance = dict(self.cfg.provenance)
        return sae

    def initialize_weights(self) -> None:
        """Build the dictionary; SAELens asks for it."""
        ours = {name: tuple(value) if isinstance(value, list) else value for name, value in self.cfg.writesae.items()}
        self.dictionary = WriteSAE(WriteSAEConfig.from_dict(ours)).to(device=self.device, dtype=self.dtype)

    @property
    def W_enc(self) -> Tensor:
        """The encoder written out, [d_in, d_sae]."""
        return flat(self.dictionary).W_enc

    @property
    def W_dec(self) -> Tensor:
        """The atoms written out, [d_sae, d_in]."""
        return flat(self.dictionary).W_dec

    @property
    def b_dec(self) -> Tensor:
        """The mean, flattened, or zeros: [d_in]."""
        return flat(self.dictionary).b_dec

    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., d_sae] in raw units of inputs [..., d_in]."""
        maps = flat(self.dictionary)
        scores = self.process_sae_in(x) @ maps.W_enc
        if "b_enc" in maps.activation:
            scores = scores + maps.activation["b_enc"]
        return self.hook_sae_acts_post(self._activate(self.hook_sae_acts_pre(scores), maps))

    def _activate(self, scores: Tensor, maps: Flat) -> Tensor:
        kind, own = self.dictionary.config.activation, maps.activation
        if kind == "topk":
            return TopK(self.dictionary.config.k)(scores)
        if kind in ("jumprelu", "batch_topk"):
            return scores.relu() * (scores > own["threshold"])
        magnitudes = (own["r_mag"].exp() * scores + own["b_mag"]).relu()
        margins = scores + own["b_gate"]
        if kind == "gated":
            return magnitudes * (margins > 0)
        # The gate's width is in scaled units, as its bias is.
        return magnitudes * (margins * self.dictionary.input_scale / GATE_TEMPERATURE).sigmoid()

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstructions [..., d_in]."""
        maps = flat(self.dictionary)
        rebuilt = self.hook_sae_recons(feature_acts @ maps.W_dec + maps.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(rebuilt), self.d_head)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """SAELens reads every tensor in the SAE's dtype; the counter of steps is a whole number."""
        name = "dictionary.steps_since_active"
        state_dict[name] = state_dict[name].to(torch.int64)

    def fold_W_dec_norm(self) -> None:
        """Refused: the norms of the atoms are part of the dictionary; `to_saelens(sae, densify=True)` gives one to fold."""
        raise NotImplementedError(
            "the atoms of a WriteSAE keep their norms; fold those of to_saelens(sae, densify=True)"
        )

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Refused, as is folding norms: a WriteSAE has an input scale of its own."""
        raise NotImplementedError("a WriteSAE has an input scale of its own and takes none from SAELens")

    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """Refused: a whitened factor is no factor any more."""
        raise NotImplementedError("whitening does not fold into factors; fold it into to_saelens(sae, densify=True)")


register_sae_class(NAME, FactoredSAE, FactoredSAEConfig)
