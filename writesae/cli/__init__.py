"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae replace     replace writes by the atoms of a saved dictionary
writesae erase       take away what atoms wrote, write them where they are silent
writesae readers     find the later heads that read the writes of an atom
writesae steer       generate with amplified atoms, and with controls of equal norm
writesae models      the models that ship with the package
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import cache, erase, main, readers, steer, train
from writesae.cli.base import app

__all__ = ["app", "cache", "erase", "main", "readers", "steer", "train"]
