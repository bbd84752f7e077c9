"""The experiments of a reproduction by name, in the order of the paper: each takes the bench and gives results by variant."""

from collections.abc import Callable

from writesae.evaluation.replacement import ReplacementConfig, replacement
from writesae.evaluation.result import Result
from writesae.reproduce.bench import Bench


def _replacement(bench: Bench) -> dict[str, Result]:
    config = ReplacementConfig(total=bench.config.firings, per_atom=bench.config.per_atom, seed=bench.config.seed)
    return {
        source: replacement(
            bench.model,
            bench.dictionary(source),
            bench.tokens,
            **bench.where,
            config=config,
            on_progress=bench.progress(f"replacement, {source}"),
        )
        for source in ("write", "state")
    }


STEPS: dict[str, Callable[[Bench], dict[str, Result]]] = {"replacement": _replacement}
"""By name, what a step does."""
