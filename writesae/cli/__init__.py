"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

writesae demo        the whole experiment on a bundled model, with a report
writesae train       learn dictionaries, of one head or of many, from flags or a file
writesae cache       keep what they are trained on on disk, and list what is there
writesae objectives  compare what dictionaries are taught, by how well their atoms replace writes
writesae replace     replace writes by the atoms of a saved dictionary
writesae replace-cells  the same in every cell that has a dictionary
writesae population  the same over many atoms, atom by atom
writesae passage-test  leave out every write that some atoms stand for
writesae logits      predict what adding atoms does to later logits, and measure it
writesae erase       take away what atoms wrote, write them where they are silent
writesae readers     find the later heads that read the writes of an atom
writesae baselines   the same with what is no rank-1 dictionary: FlatSAE + SVD and others
writesae encoder-swap  every pairing of encoder and decoder, at one budget
writesae install     make tokens appear by writing into one head's memory, against controls
writesae sign-test   edits of single cached states along a token's direction, measured against predicted
writesae steer       generate with amplified atoms, and with controls of equal norm
writesae models      the models that ship with the package
writesae partition   which atoms look like one native write, and whether there are two kinds
writesae perplexity  what reconstructed memories cost the text that follows
writesae selectivity the paper's selectivity, and why it says little
writesae report      one page with every atom of a dictionary, to open in any browser
writesae view        the same page with a live prompt box, on this machine
writesae convert     turn a .pt file of the paper's code into a dictionary of this package
"""

from writesae.cli import (
    baselines,
    cache,
    encoder_swap,
    erase,
    install,
    logits,
    main,
    objectives,
    partition,
    passage_test,
    perplexity,
    population,
    readers,
    replace,
    report,
    reproduce,
    selectivity,
    sign_test,
    steer,
    train,
    view,
)
from writesae.cli.base import app

__all__ = [
    "app",
    "baselines",
    "cache",
    "encoder_swap",
    "erase",
    "install",
    "logits",
    "main",
    "objectives",
    "partition",
    "passage_test",
    "perplexity",
    "population",
    "readers",
    "replace",
    "report",
    "reproduce",
    "selectivity",
    "sign_test",
    "steer",
    "train",
    "view",
]
