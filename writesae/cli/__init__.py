"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae replace     replace writes by the atoms of a saved dictionary
writesae population  the same over many atoms, atom by atom
writesae passage-test  leave out every write that some atoms stand for
writesae logits      predict what adding atoms does to later logits, and measure it
writesae erase       take away what atoms wrote, write them where they are silent
writesae readers     find the later heads that read the writes of an atom
writesae baselines   the same with what is no rank-1 dictionary: FlatSAE + SVD and others
writesae encoder-swap  every pairing of encoder and decoder, at one budget
writesae models      the models that ship with the package
writesae partition   which atoms look like one native write, and whether there are two kinds
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import (
    baselines,
    cache,
    encoder_swap,
    erase,
    logits,
    main,
    partition,
    passage_test,
    population,
    readers,
    reproduce,
    train,
)
from writesae.cli.base import app

__all__ = [
    "app",
    "baselines",
    "cache",
    "encoder_swap",
    "erase",
    "logits",
    "main",
    "partition",
    "passage_test",
    "population",
    "readers",
    "reproduce",
    "train",
]
