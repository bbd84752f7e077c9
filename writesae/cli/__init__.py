"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae objectives  compare what dictionaries are taught, by how well their atoms replace writes
writesae replace     replace writes by the atoms of a saved dictionary
writesae population  the same over many atoms, atom by atom
writesae passage-test  leave out every write that some atoms stand for
writesae models      the models that ship with the package
writesae partition   which atoms look like one native write, and whether there are two kinds
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import cache, main, objectives, partition, passage_test, population, reproduce, train
from writesae.cli.base import app

__all__ = ["app", "cache", "main", "objectives", "partition", "passage_test", "population", "reproduce", "train"]
