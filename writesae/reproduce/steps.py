"""The experiments of a reproduction by name, in the order of the paper: each takes the bench and gives results by variant."""

from collections.abc import Callable
from dataclasses import replace

import torch

from writesae.evaluation.acting.erasure import ErasureConfig, erasure
from writesae.evaluation.acting.readers import ReadersConfig, readers
from writesae.evaluation.acting.steering import SteeringConfig, steering
from writesae.evaluation.comparing.baselines import BaselinesConfig, baselines
from writesae.evaluation.comparing.encoder_swap import TYPES, EncoderSwapConfig, encoder_swap
from writesae.evaluation.comparing.objectives import ObjectivesConfig, compare_objectives
from writesae.evaluation.describing.class_differences import ClassDifferencesConfig, class_differences
from writesae.evaluation.describing.partition import PartitionConfig, partition
from writesae.evaluation.describing.perplexity import PerplexityConfig, perplexity
from writesae.evaluation.describing.selectivity import SelectivityConfig, selectivity
from writesae.evaluation.installing.install import InstallConfig, install
from writesae.evaluation.predicting.logit_shift import LogitShiftConfig, logit_shift
from writesae.evaluation.predicting.sign_test import SignTestConfig, sign_test
from writesae.evaluation.replacing.passage_test import PassageTestConfig, passage_test
from writesae.evaluation.replacing.population import PopulationConfig, population
from writesae.evaluation.replacing.replacement import ReplacementConfig, replacement
from writesae.evaluation.replacing.replacement_cells import sweep_cells
from writesae.evaluation.result import Result
from writesae.reproduce.bench import Bench
from writesae.stream.sources import Source, describe
from writesae.training.objectives import ObjectiveConfig

Results = dict[str, Result]


def _replacement(bench: Bench) -> Results:
    """The test of the paper's headline, for each kind of dictionary on the same passages."""
    size = bench.config
    config = ReplacementConfig(total=size.firings, per_atom=size.per_atom, seed=size.seed)
    fewer = replace(config, total=size.firings // 3)
    results = {"best": bench.test(replacement, "replacement, best", bench.taught(), config)}
    if not size.quick:
        results["best_kl"] = bench.test(replacement, "replacement, best, then KL", bench.taught("relative_kl"), config)
    for source in ("write", "state"):
        results[source] = bench.test(replacement, f"replacement, {source}", bench.dictionary(source), fewer)
    return results


def _heads(bench: Bench) -> Results:
    """All heads of the cell's layer, and (but for a quick run) its head in all layers, each with its own dictionary."""
    size, (_, own) = bench.config, bench.cell
    column = [(layer, own) for layer in bench.model.cfg.recurrent_layers]
    cells = list(dict.fromkeys(bench.layer_cells[:2] if size.quick else bench.layer_cells + column))
    saes = bench.dictionaries("write", cells)
    by_cell = {(layer, head): sae for (layer, head, _), sae in saes.items()}
    config = ReplacementConfig(total=max(30, size.firings // 24), seed=size.seed)
    return {"write": sweep_cells(bench.model, by_cell, bench.tokens, config, on_progress=bench.progress("heads"))}


def _population(bench: Bench) -> Results:
    """Every atom counts once; then register against bundle atoms, on the same firings."""
    size = bench.config
    config = PopulationConfig(n_atoms=max(40, size.firings // 20), per_atom=min(20, size.per_atom + 1), seed=size.seed)
    return {"write": bench.test(population, "population", bench.dictionary(), config)}


def _passage_test(bench: Bench) -> Results:
    passages, config = 6 if bench.config.quick else 40, PassageTestConfig(most=40, seed=bench.config.seed)
    return {"write": bench.test(passage_test, "passages", bench.dictionary(), config, passages)}


def _logits(bench: Bench) -> Results:
    """The dictionary's own cell, and three others with random atoms there."""
    cells = [(int(row.layer), int(row.head)) for row in bench.cells.itertuples()]
    others = [cell for cell in cells if cell != bench.cell]
    generator = torch.Generator().manual_seed(bench.config.seed)
    some = [others[i] for i in torch.randperm(len(others), generator=generator)[:3].tolist()]
    config = LogitShiftConfig(total=bench.config.contexts, cells=(bench.cell, *some), seed=bench.config.seed)
    own = replace(config, cells=(bench.cell,))
    config = replace(config, total=max(10, bench.config.contexts // 2))
    sae = bench.dictionary()
    return {
        "own_cell": bench.test(logit_shift, "logit shifts, own cell", sae, own),
        "four_cells": bench.test(logit_shift, "logit shifts, four cells", sae, config),
    }


def _erase(bench: Bench) -> Results:
    config = ErasureConfig(count=6, per_atom=40, writes=20, doses=(1.0, 2.0, 4.0), seed=bench.config.seed)
    if bench.config.quick:
        config = replace(config, count=3, per_atom=24, writes=10, doses=(1.0, 4.0))
    return {"write": bench.test(erasure, "erasure", bench.dictionary(), config)}


def _sign_test(bench: Bench) -> Results:
    config = SignTestConfig(total=100 if bench.config.quick else 2000, seed=bench.config.seed)
    return {"write": bench.test(sign_test, "sign test", bench.dictionary(), config)}


def _install(bench: Bench) -> Results:
    """The middle stratum at the paper's middle magnitude, in one head and in many; other strata; other magnitudes."""
    size, sae = bench.config, bench.dictionary()
    middle = InstallConfig(
        prompts=size.trials // 2, positions=1, cells=("auto",), strata=("middle",), magnitudes=(3.0,), seed=size.seed
    )
    results = {"middle": bench.test(install, "install", sae, middle)}
    if not size.quick:
        few = replace(middle, prompts=size.trials // 5)
        others = replace(few, strata=("frequent", "rare", "semantic"), steering=False)
        doses = replace(few, magnitudes=(1.5, 6.0), steering=False)
        results |= {
            "spread": bench.test(install, "install, many heads", sae, replace(middle, cells=("spread",))),
            "strata": bench.test(install, "install, strata", sae, others),
            "doses": bench.test(install, "install, doses", sae, doses),
        }
    return results


def _steer(bench: Bench) -> Results:
    """All heads of the cell's layer together, each with its dictionary of states."""
    config = SteeringConfig(prompts=20, doses=(2.0, 5.0, 10.0), new_tokens=30, seed=bench.config.seed)
    if bench.config.quick:
        config = replace(config, prompts=6, doses=(5.0,), new_tokens=20)
    saes = {head: sae for (_, head, _), sae in bench.dictionaries("state", bench.layer_cells).items()}
    found = steering(
        bench.model, saes, bench.tokens, layer=bench.cell[0], config=config, on_progress=bench.progress("steering")
    )
    return {"state": found}


def _partition(bench: Bench) -> Results:
    """Register and bundle atoms, with the dictionaries of other seeds to match."""
    config, results = PartitionConfig(seed=bench.config.seed), {}
    for source in ("write", "state"):
        first, *others = bench.dictionaries(source, [bench.cell], range(min(2, bench.config.seeds))).values()
        results[source] = bench.test(partition, f"partition, {source}", first, config, others=others)
    return results


def _class_differences(bench: Bench) -> Results:
    """Register against bundle atoms of the state dictionary, where both kinds are; split by the threshold."""
    size, sae = bench.config, bench.dictionary("state")
    config = PopulationConfig(n_atoms=max(10, size.firings // 30), per_atom=min(10, size.per_atom), seed=size.seed)
    tested = bench.test(population, "class differences", sae, config)
    parts = bench.test(partition, "partition, state", sae, PartitionConfig(seed=size.seed))
    split = ClassDifferencesConfig(cut="threshold")
    return {"state": class_differences(tested.replacement, parts, config=split)}  # type: ignore[attr-defined, arg-type]


def _selectivity(bench: Bench) -> Results:
    config = SelectivityConfig(total=40 if bench.config.quick else 200, seed=bench.config.seed)
    return {"write": bench.test(selectivity, "selectivity", bench.dictionary(), config)}


def _readers(bench: Bench) -> Results:
    config = ReadersConfig(seed=bench.config.seed)
    if bench.config.quick:
        config = replace(config, count=4, per_atom=10)
    return {"write": bench.test(readers, "readers", bench.dictionary(), config)}


def _perplexity(bench: Bench) -> Results:
    """All heads of the cell's layer, each with its own dictionary."""
    config = PerplexityConfig(subsets=2 if bench.config.quick else 5, seed=bench.config.seed)
    tokens = bench.tokens[: 8 if bench.config.quick else 100]
    results = {}
    for source in ("state", "write"):
        saes = {head: sae for (_, head, _), sae in bench.dictionaries(source, bench.layer_cells).items()}
        told = bench.progress(f"perplexity, {source}")
        results[source] = perplexity(
            bench.model, saes, tokens, layer=bench.cell[0], config=config, on_progress=told
        )  # fmt: skip
    return dict(results)


def _baselines(bench: Bench) -> Results:
    config = BaselinesConfig(total=max(30, bench.config.firings // 12), seed=bench.config.seed)
    sae = bench.dictionary()
    return {"write": bench.test(baselines, "baselines", sae, config, train_tokens=bench.train_text)}


def _encoder_swap(bench: Bench) -> Results:
    size = bench.config
    config = EncoderSwapConfig(
        presets=("flat", "bilinear") if size.quick else TYPES,
        seeds=(0,),
        n_atoms=size.n_atoms,
        k=size.k,
        steps=max(100, size.train_steps // 4),
        total=max(30, size.firings // 24),
        seed=size.seed,
    )
    found = encoder_swap(
        bench.model,
        bench.tokens,
        train_tokens=bench.train_text,
        cells=[bench.cell],
        config=config,
        folder=bench.folder / "encoder_swap",
        on_progress=bench.progress("encoder swap"),
    )
    return {"write": found}


def _objectives(bench: Bench) -> Results:
    size = bench.config
    budget = ObjectiveConfig(n_atoms=size.n_atoms, k=size.k, steps=max(400, size.train_steps // 5))
    erases = f"blocks.{bench.cell[0]}.mixer.hook_erase" in bench.model.hook_dict
    names = ("state", "write", *(["net"] if erases else []), "fisher", "single", "relative", "relative_kl")
    by_channel = describe(bench.model, Source(f"blocks.{bench.cell[0]}.mixer.hook_state", bench.cell[1])).vector_decay
    seeds = min(3, size.seeds) if by_channel else size.seeds  # there every state is formed, at many times the work
    config = ObjectivesConfig(
        objectives=names, seeds=seeds, training=budget, firings=size.firings // 20, seed=size.seed
    )
    if size.quick:
        config = ObjectivesConfig.quick(seed=size.seed, seeds=1, firings=40)
    found = compare_objectives(
        bench.model,
        bench.train_text.tokens.to(bench.model.device),
        bench.tokens,
        layer=bench.cell[0],
        head=bench.cell[1],
        config=config,
        folder=bench.folder / "objectives",
        on_progress=bench.progress("dictionaries"),
    )
    return {"all": found}


STEPS: dict[str, Callable[[Bench], Results]] = {
    "replacement": _replacement,
    "heads": _heads,
    "population": _population,
    "passage_test": _passage_test,
    "logits": _logits,
    "erase": _erase,
    "sign_test": _sign_test,
    "install": _install,
    "steer": _steer,
    "partition": _partition,
    "class_differences": _class_differences,
    "selectivity": _selectivity,
    "readers": _readers,
    "perplexity": _perplexity,
    "baselines": _baselines,
    "encoder_swap": _encoder_swap,
    "objectives": _objectives,
}
"""By name, what a step does."""
