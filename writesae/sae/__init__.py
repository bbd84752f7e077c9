"""The dictionary: atoms, encoder, sparsifier, loss at factor cost, files."""

from writesae.sae.codes import Codes
from writesae.sae.write_sae import LossOutput, Residual, WriteSAE

__all__ = ["Codes", "LossOutput", "Residual", "WriteSAE"]
