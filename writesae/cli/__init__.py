"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae replace     replace writes by the atoms of a saved dictionary
writesae models      the models that ship with the package
writesae partition   which atoms look like one native write, and whether there are two kinds
writesae perplexity  what reconstructed memories cost the text that follows
writesae selectivity the paper's selectivity, and why it says little
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import cache, main, partition, perplexity, selectivity, train
from writesae.cli.base import app

__all__ = ["app", "cache", "main", "partition", "perplexity", "selectivity", "train"]
