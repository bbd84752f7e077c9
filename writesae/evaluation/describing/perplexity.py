"""What a spliced memory costs the text that follows (WriteSAE, arXiv:2605.12770, section 4 and its code).

The model reads a prefix. Then the memory of one or several heads of one layer is exchanged for another matrix, everything else
that it remembers (other layers, tails of convolutions and token shifts) left as it was, and it reads on: cross-entropy on the
rest of the passage, in nats per token, against the run that nobody touched. What is put there:

    state, writes, net_writes   what the dictionary makes of it, by its kind; see splices.py
    throughout                  the reconstructions of all writes of the prefix, in place while the prefix is read, so that the
                                reads of the prefix and the layers above see them too (where `throughout` asks for it)
    zero                        nothing
    mean                        the mean memory of the other passages after as many tokens
    svd                         the best matrix of a rank
    self                        itself: the numerical floor

Heads are spliced one at a time, all at once, and in random subsets between. Passages cut from one file resemble each other; the
intervals redraw passages.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, StateEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.edits import Edit
from hooked_recurrent.patching.forks import Fork, Trunk, run_edits
from writesae.evaluation.describing.perplexity_result import MEAN, SELF, SVD, THROUGHOUT, ZERO, PerplexityResult
from writesae.evaluation.describing.splices import (
    check_dictionaries,
    check_throughout,
    native_states,
    rebuilt_states,
    write_edits,
)
from writesae.evaluation.firings import check_passages
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE

_MEMORY = 2**28
Heads = tuple[int, ...]


@dataclass(frozen=True)
class PerplexityConfig(StrictConfig):
    """Where the text is cut, and which memories are put in."""

    prefix: int | None = None
    """Tokens read before the splice; None: half of the passage (the paper: 512 of 1024)."""
    subsets: int = 5
    """Random subsets of heads per size between one head and all; all subsets where there are no more."""
    ranks: tuple[int, ...] | None = None
    """Ranks of the best approximations; None: 1, 2, 4, .. and the full rank."""
    throughout: bool = False
    """Whether writes are also replaced while the prefix is read; only for dictionaries of additive writes."""
    near: int = 16
    """First tokens behind the splice that are also averaged by themselves: a head forgets, and what it lost with it."""
    seed: int = 42
    """Seed of the subsets."""

    def __post_init__(self) -> None:
        require_positive("PerplexityConfig", subsets=self.subsets, near=self.near)
        if self.prefix is not None:
            require_positive("PerplexityConfig", prefix=self.prefix)
        for rank in self.ranks or ():
            require_positive("PerplexityConfig", ranks=rank)


@dataclass(frozen=True)
class _Condition:
    variant: str
    heads: Heads
    rank: int = 0


@torch.no_grad()
def perplexity(
    model: HookedRecurrentModel,
    sae: WriteSAE | Mapping[int, WriteSAE],
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int | None = None,
    config: PerplexityConfig | None = None,
    on_progress: Told | None = None,
) -> PerplexityResult:
    """Splice the memories of some heads after a prefix, and measure the cross-entropy on the rest of every passage.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of `head`, or dictionaries by head; one of states rebuilds the state, one of writes all writes of the
            prefix.
        tokens: held-out passages, two or more.
        layer, head: the cell; no head beside dictionaries by head.
        config: where the text is cut, ranks, subsets.
        on_progress: told (passages done, passages in all).

    Raises:
        ValueError, IndexError: before anything runs, for a cell or dictionary that does not fit, fewer than two passages, a
            prefix that leaves no text to read, a rank beyond the states', and `throughout` with other than additive writes.
    """
    config = PerplexityConfig.given(config)
    check_passages(tokens)
    saes = dict(sae) if isinstance(sae, Mapping) else _of_one(sae, head)
    if isinstance(sae, Mapping) and head is not None:
        raise ValueError(f"dictionaries by head name their heads themselves, but head {head} was given too")
    kind = check_dictionaries(model, saes, layer)
    length, full = tokens.shape[1], min(model.cfg.d_k, model.cfg.d_v)
    prefix = length // 2 if config.prefix is None else config.prefix
    ranks = _ranks(full) if config.ranks is None else config.ranks
    if len(tokens) < 2:
        raise ValueError(f"a mean memory of other passages needs two passages or more, got {len(tokens)}")
    if not 1 <= prefix <= length - 2:
        raise ValueError(f"a prefix of {prefix} tokens leaves nothing to predict in passages of {length}")
    if max(ranks) > full:
        raise ValueError(f"rank {max(ranks)} is beyond that of the states, {full}")
    if config.throughout:
        check_throughout(saes, kind)
    heads = list(saes)
    conditions = _conditions(kind, head_subsets(heads, config.subsets, config.seed), ranks, config.throughout)
    natives = torch.stack([native_states(model, row[None, :prefix], layer, heads) for row in tokens])
    rows: list[dict[str, Any]] = []
    for passage, text in enumerate(tokens):
        others = (natives.sum(0) - natives[passage]) / (len(natives) - 1)
        test = _Passage(model, saes, text[None], layer, prefix, natives[passage], others, kind, config.near)
        rows += [{"passage": passage, **row} for row in test.measure(conditions)]
        if on_progress is not None:
            on_progress(passage + 1, len(tokens))
    settled = {**config.to_dict(), "prefix": prefix, "ranks": list(ranks)}
    return PerplexityResult(pd.DataFrame(rows), layer, min(heads), settled, heads=heads, dictionary=kind)


def _of_one(sae: WriteSAE, head: int | None) -> dict[int, WriteSAE]:
    if head is None:
        raise ValueError("a single dictionary needs the head that it is spliced into, got None")
    return {head: sae}


def _ranks(full: int) -> tuple[int, ...]:
    """1, 2, 4, .. and the full rank."""
    return tuple(sorted({2**power for power in range(full.bit_length()) if 2**power < full} | {full}))


def head_subsets(heads: list[int], most: int, seed: int) -> list[Heads]:
    """Subsets of 1, 2, 4, .. heads and of all: every one of a size, or `most` different random ones where there are more.

    Single heads are all taken: each has a dictionary of its own to be judged.
    """
    generator = np.random.default_rng(seed)
    sizes = sorted({2**power for power in range(len(heads).bit_length()) if 2**power < len(heads)} | {len(heads)})
    found: list[Heads] = []
    for size in sizes:
        if size == 1 or comb(len(heads), size) <= most:
            found += [tuple(sorted(chosen)) for chosen in combinations(heads, size)]
            continue
        drawn: dict[Heads, None] = {}
        while len(drawn) < most:
            drawn[tuple(sorted(generator.choice(heads, size, replace=False).tolist()))] = None
        found += list(drawn)
    return found


def _conditions(kind: str, subsets: list[Heads], ranks: tuple[int, ...], throughout: bool) -> list[_Condition]:
    variants = (SELF, ZERO, MEAN, kind, *([THROUGHOUT] if throughout else []))
    return [
        condition
        for heads in subsets
        for condition in (
            *(_Condition(variant, heads) for variant in variants),
            *(_Condition(SVD, heads, rank) for rank in ranks),
        )
    ]


@dataclass(frozen=True)
class _Passage:
    """One passage, cut after `prefix` tokens, with what may be put in the place of its memories."""

    model: HookedRecurrentModel
    saes: dict[int, WriteSAE]
    text: Tensor
    layer: int
    prefix: int
    native: Float[Tensor, "head d_k d_v"]
    others: Float[Tensor, "head d_k d_v"]
    kind: str
    near: int

    def measure(self, conditions: list[_Condition]) -> Iterator[dict[str, Any]]:
        """A row per condition, in their order."""
        read = self.text[:, : self.prefix]
        rebuilt = rebuilt_states(self.model, self.saes, read, self.layer, self.native)
        left, singular, right = torch.linalg.svd(self.native.double(), full_matrices=False)
        given = {SELF: self.native, ZERO: torch.zeros_like(self.native), MEAN: self.others, self.kind: rebuilt}
        put: list[Float[Tensor, "head d_k d_v"]] = []
        for condition in conditions:
            rank = condition.rank
            low = (left[..., :rank] * singular[:, None, :rank]) @ right[:, :rank]
            put.append(given.get(condition.variant, low.to(self.native) if rank else self.native))
        plain = self.model(self.text, return_type="loss", loss_per_token=True)[0, self.prefix :].double()
        losses = self._losses(conditions, put)
        for index, condition in enumerate(conditions):
            places = [list(self.saes).index(head) for head in condition.heads]
            missed = (put[index] - self.native)[places].square().sum() / self.native[places].square().sum()
            yield {
                "variant": condition.variant,
                "rank": condition.rank,
                "k": len(condition.heads),
                "heads": ",".join(map(str, condition.heads)),
                "ce": float(losses[index].mean()),
                "ce_native": float(plain.mean()),
                "ce_near": float(losses[index][: self.near].mean()),
                "ce_native_near": float(plain[: self.near].mean()),
                "tokens": self.text.shape[1] - 1 - self.prefix,
                "error": float("nan") if condition.variant == THROUGHOUT else float(missed),
            }

    def _losses(self, conditions: list[_Condition], put: list[Tensor]) -> dict[int, Tensor]:
        """Losses of every condition, by index. Those that change the prefix run one at a time: each has a term per atom."""
        spliced: dict[int, list[Edit]] = {}
        found: dict[int, Tensor] = {}
        kept = Trunk.grow(self.model, self.text, [0, self.prefix - 1])
        for index, condition in enumerate(conditions):
            if condition.variant != THROUGHOUT:
                spliced[index] = [self._splice(head, put[index]) for head in condition.heads]
                continue
            read = self.text[:, : self.prefix]
            edits = [
                edit
                for head in condition.heads
                for edit in write_edits(self.model, self.saes[head], read, self.layer, head)
            ]
            for fork in run_edits(self.model, self.text, [edits], horizon=None, trunk=kept):
                found[index] = self._loss(fork)
        numbers = list(spliced)
        forks = run_edits(self.model, self.text, list(spliced.values()), horizon=None, memory=_MEMORY, trunk=kept)
        for fork in forks:
            found[numbers[fork.index]] = self._loss(fork)
        return found

    def _splice(self, head: int, put: Float[Tensor, "head d_k d_v"]) -> StateEdit:
        """The last token of the prefix still reads the native memory; what is put there is carried on."""
        matrix = put[list(self.saes).index(head)].clone()
        return StateEdit(self.layer, head, self.prefix - 1, "replace", matrix, reading="cache")

    def _loss(self, fork: Fork) -> Float[Tensor, " pos"]:
        """Cross-entropy, by the tokens behind the prefix, of every token behind the first of them."""
        logits = fork.logits[self.prefix - fork.position : -1]
        return F.cross_entropy(logits, self.text[0, self.prefix + 1 :], reduction="none").double()
