"""The command line: parses and calls. Progress goes to standard error; tables and --json to standard output.

Start here         demo, models, reproduce
Learn              train, cache list, cache write
Look               report, view
Replace            replace, replace-cells, population, passage-test
Predict and steer  logits, sign-test, install, steer, erase
Describe           partition, readers, selectivity, perplexity
Compare            baselines, encoder-swap, objectives
Files and records  convert

A verb is a module with the options of its own. What all have, --config, --json, plain errors and the place in the help, comes
from `base`; what every experiment on a dictionary has, the dictionary, its model, text, seed, results and the dry run, from
`experiments`.
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
