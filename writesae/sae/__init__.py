"""The dictionary: atoms, encoders, sparsifiers, samples, loss at factor cost, files."""

from writesae.sae.codes import Codes
from writesae.sae.samples import Factored, Matrices, Samples, Vectors
from writesae.sae.views import atoms_html
from writesae.sae.write_sae import LossOutput, WriteSAE

__all__ = ["Codes", "Factored", "LossOutput", "Matrices", "Samples", "Vectors", "WriteSAE", "atoms_html"]
