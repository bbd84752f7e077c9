"""The prompts of the install experiment: where they end, what the untouched model makes of them, which tokens are wanted.

A context is a passage cut after its install position; the edits go to the three positions that end there. The untouched
model's greedy continuation is kept with it: the collateral KL is measured on it, and its queries are what the coming reads
look like until an edit changes the first token.

Targets are drawn from four strata (protocol 9); ranks count the tokens that are more likely as the next one, from 0:

    frequent   one of the most frequent tokens of the text
    middle     initially ranked 100 to 999
    rare       initially ranked 1,000 or lower
    semantic   out of context: a word that other passages use and this prompt does not
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.patching.forks import Trunk

PLACES = 3
"""Consecutive positions that an install edits; the last one is the install position."""
STRATA = ("frequent", "middle", "rare", "semantic")


@dataclass(frozen=True)
class Target:
    """A token that should be made to appear."""

    token: int
    """Its number."""
    stratum: str
    """One of `STRATA`."""
    rank: int
    """How many tokens are more likely as the next one in the untouched run."""


@dataclass(frozen=True)
class Context:
    """A prompt, and what the untouched model makes of it."""

    passage: int
    """Row of the tokens."""
    position: int
    """The install position: that of the prompt's last token."""
    text: Int[Tensor, "one pos"]
    """The prompt and the untouched model's greedy continuation."""
    log_probs: Float[Tensor, "step d_vocab"]
    """Of the untouched run, float64, for every token of the continuation."""
    trunk: Trunk
    """The plain pass over all tokens but the last, with the state before the first edited position."""
    roles: dict[tuple[int, str], Float[Tensor, "read head _"]]
    """Per (layer, "write_key" | "write_value" | "query") the factors from the first edited position on."""

    @property
    def first(self) -> int:
        """The first edited position."""
        return self.position - PLACES + 1

    @property
    def places(self) -> slice:
        """The edited positions."""
        return slice(self.first, self.position + 1)

    @property
    def read(self) -> Int[Tensor, "one pos"]:
        """The tokens that are read from the first edited position on."""
        return self.text[:, self.first : -1]

    @property
    def continuation(self) -> Int[Tensor, " step"]:
        """The untouched model's greedy continuation."""
        return self.text[0, self.position + 1 :]

    def native_norms(self, layer: int) -> Float[Tensor, "place head"]:
        """Frobenius norms of the layer's native writes at the edited positions, as the recurrence adds them.

        The value side holds whatever gate the rule puts on its writes (Gated DeltaNet's beta, Mamba-2's dt).
        """
        key, value = (self.roles[layer, f"write_{side}"][:PLACES] for side in ("key", "value"))
        return key.norm(dim=-1) * value.norm(dim=-1)

    @staticmethod
    @torch.no_grad()
    def open(
        model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], passage: int, position: int, steps: int
    ) -> "Context":
        """Cut a passage after `position` and run the untouched model from there for `steps` greedy tokens."""
        prompt = tokens[passage : passage + 1, : position + 1].to(model.device)
        text = model.generate(prompt, steps, stop_at_eos=False)
        first = position - PLACES + 1
        trunk = Trunk.grow(model, text[:, :-1], [first])
        layers, wanted = model.cfg.recurrent_layers, ("write_key", "write_value", "query")
        names = {(layer, role): f"blocks.{layer}.mixer.hook_{role}" for layer in layers for role in wanted}
        logits, cache = model.run_with_cache(
            text[:, first:-1], names_filter=list(names.values()), state=trunk.states[first]
        )
        roles = {site: cache[name][0] for site, name in names.items()}
        log_probs = logits[0, PLACES - 1 :].double().log_softmax(-1)
        return Context(passage, position, text, log_probs, trunk, roles)


def install_sites(
    tokens: Int[Tensor, "passage pos"], prompts: int, positions: int, first: int, seed: int
) -> list[tuple[int, int]]:
    """(passage, install position) of every context: random passages, and in each random positions from `first` on."""
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for passage in torch.randperm(len(tokens), generator=generator)[:prompts].sort().values.tolist():
        chosen = torch.randperm(tokens.shape[1] - first, generator=generator)[:positions] + first
        sites += [(passage, position) for position in chosen.sort().values.tolist()]
    return sites


def draw_targets(
    context: Context,
    tokens: Int[Tensor, "passage pos"],
    *,
    per_stratum: int,
    strata: tuple[str, ...] = STRATA,
    middle: tuple[int, int],
    seed: int,
    frequent: int = 64,
    is_word: Callable[[int], bool] | None = None,
) -> list[Target]:
    """At most `per_stratum` different targets of every stratum, in the order of `STRATA`, for one context.

    Args:
        context: where they should appear.
        tokens: all passages, whose counts say what is frequent and what other passages use.
        per_stratum: how many of each.
        strata: which of them are wanted; the targets of each are the same whichever others are.
        middle: first rank of the middle stratum, and first rank behind it; rare tokens come from there on.
        seed: of the draw, together with the context's passage and position.
        frequent: how many of the text's most frequent tokens count as frequent.
        is_word: which tokens may be semantic targets; None allows all.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + context.passage) * 1_000_003 + context.position)
    first = context.log_probs[0]
    rank = torch.empty_like(first, dtype=torch.long)
    rank[first.argsort(descending=True, stable=True)] = torch.arange(len(first), device=first.device)
    rank = rank.cpu()
    counts = tokens.cpu().flatten().bincount(minlength=len(first))
    others = counts - tokens[context.passage].cpu().bincount(minlength=len(first))
    here = context.text[0, : context.position + 1].cpu().bincount(minlength=len(first))
    words = torch.tensor([is_word is None or is_word(token) for token in range(len(first))])
    pools = {
        "frequent": (counts >= counts.sort(descending=True).values[min(frequent, len(counts)) - 1]) & (rank > 0),
        "middle": (rank >= middle[0]) & (rank < middle[1]),
        "rare": rank >= middle[1],
        "semantic": (others > 1) & (here == 0) & words & (rank > 0),
    }
    taken: set[int] = set()
    targets = []
    for stratum in STRATA:  # all are drawn, whatever is wanted, so that leaving one out changes no other
        for token in _draw(pools[stratum], taken, per_stratum, generator):
            targets.append(Target(token, stratum, int(rank[token])))
    return [target for target in targets if target.stratum in strata]


def _draw(pool: Bool[Tensor, " d_vocab"], taken: set[int], count: int, generator: torch.Generator) -> list[int]:
    candidates = [token for token in pool.nonzero()[:, 0].tolist() if token not in taken]
    chosen = [candidates[index] for index in torch.randperm(len(candidates), generator=generator)[:count].tolist()]
    taken.update(chosen)
    return chosen
