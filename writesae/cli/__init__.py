"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae replace     replace writes by the atoms of a saved dictionary
writesae install     make tokens appear by writing into one head's memory, against controls
writesae sign-test   edits of single cached states along a token's direction, measured against predicted
writesae models      the models that ship with the package
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import cache, install, main, sign_test, train
from writesae.cli.base import app

__all__ = ["app", "cache", "install", "main", "sign_test", "train"]
