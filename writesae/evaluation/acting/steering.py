"""Steering by amplified atoms (WriteSAE, arXiv:2605.12770, newline steering), without the defects of its code (protocol 10).

Boundary positions are the tokens t whose NEXT token is one of the wanted ones (by default every token with a newline in it).
Codes are taken at exactly these positions of held-out passages, and at the other positions: the score of an atom is its mean
coefficient at boundaries minus that elsewhere, signed, and the atoms with the highest scores steer. Prompts come from other
passages. At each decode step, after the token has been read, dose x mean boundary coefficient x atom, summed over the atoms, is
added to the head's state, so that it acts from the next token on; the prompt stays as it is. Conditions, at EVERY dose:

    atoms         the steering atoms
    other_atoms   as many other atoms that are alive, at their own mean coefficients, the sum at EQUAL Frobenius norm
    gaussian      a rank-1 matrix of Gaussian factors at equal Frobenius norm

Several heads steer together where several dictionaries are given, one per head, each with its own atoms and controls. Sampling
uses the same random numbers in all conditions, so that every prompt is its own control. `kl` is what the push does to the
distribution on the unsteered continuation, fed to the model as it is, averaged over it, in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel, StateEdit
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.patching import run_edits
from writesae.evaluation.acting.steering_pushes import HeadPush, head_push
from writesae.evaluation.acting.steering_result import SteeringResult
from writesae.evaluation.firings import check_cell, check_passages
from writesae.evaluation.outputs import compare
from writesae.evaluation.result import Told
from writesae.sae.write_sae import WriteSAE

BASELINE, ATOMS, OTHER, GAUSSIAN = "baseline", "atoms", "other_atoms", "gaussian"


@dataclass(frozen=True)
class SteeringConfig(StrictConfig):
    """Towards what is steered, how hard, and how text is generated."""

    token: tuple[int, ...] | None = None
    """The wanted tokens; None takes every token of the tokenizer whose text holds a newline."""
    top: int = 10
    """How many atoms steer, per head."""
    doses: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)
    """Multiples of the mean boundary coefficients."""
    prompts: int = 40
    """Prompts, each the beginning of a passage that the atoms were not chosen on."""
    prompt_length: int = 32
    """Tokens of a prompt."""
    new_tokens: int = 100
    """Tokens generated after it."""
    temperature: float = 0.7
    """Of the sampling."""
    greedy: bool = False
    """Whether the likeliest token is taken instead."""
    positions: int = 10_000
    """Most boundary positions, and most other positions, over which coefficients are averaged."""
    first_position: int = 8
    """Earliest of these positions."""
    seed: int = 123
    """Seed of positions, controls and sampling."""

    def __post_init__(self) -> None:
        require_positive("SteeringConfig", top=self.top, prompts=self.prompts, prompt_length=self.prompt_length)
        require_positive("SteeringConfig", new_tokens=self.new_tokens, temperature=self.temperature)
        require_positive("SteeringConfig", positions=self.positions, first_position=self.first_position)
        if self.new_tokens < 3:
            raise ValueError(
                f"SteeringConfig.new_tokens must be at least 3: a push acts from the third on, got {self.new_tokens}"
            )
        if self.token is not None and not self.token:
            raise ValueError("SteeringConfig.token is empty; name one token, or None for newlines")
        if not self.doses or any(not dose > 0 for dose in self.doses) or len(set(self.doses)) < len(self.doses):
            raise ValueError(f"SteeringConfig.doses must be different numbers greater than 0, got {self.doses}")


@torch.no_grad()
def steering(
    model: HookedRecurrentModel,
    sae: WriteSAE | Mapping[int, WriteSAE],
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int | None = None,
    config: SteeringConfig | None = None,
    on_progress: Told | None = None,
) -> SteeringResult:
    """Generate with amplified atoms and with their controls, and count what comes out.

    Args:
        model: any HookedRecurrentModel; texts are measured where it has a tokenizer.
        sae: the dictionary of `head`, or one dictionary per head of the layer, by head.
        tokens: held-out passages: the last `prompts` of them begin the prompts, the atoms are chosen on the others.
        layer, head: the cell; with several dictionaries no head is given, and the result names the first.
        config: wanted tokens, doses, generation.
        on_progress: told (generations done, generations in all).

    Raises:
        ValueError, IndexError: for cells that do not exist or do not fit, too few or too short passages, wanted tokens that the
            vocabulary lacks or that never come next, and fewer alive atoms than steering and its control need.
    """
    config = SteeringConfig.given(config)
    check_passages(tokens)
    dictionaries = _by_head(sae, head)
    for number, dictionary in dictionaries.items():
        check_cell(model, dictionary, layer, number)
    wanted = wanted_tokens(model, config.token)
    fitted, prompts = _split(tokens, config)
    fill = {"layer": layer, "wanted": wanted, "config": config}
    pushes = [head_push(model, dictionaries[h], fitted, head=h, **fill) for h in sorted(dictionaries)]
    study = _Study(model, prompts.to(model.device), layer, pushes, wanted, config, on_progress)
    rows = study.run()
    text = (
        {}
        if model.tokenizer is None
        else {"token_texts": [model.to_string(wanted[i : i + 1]) for i in range(len(wanted))]}
    )
    about = {
        "heads": sorted(dictionaries),
        "tokens": wanted.tolist(),
        **text,
        "atoms": [a for p in pushes for a in p.atoms],
    }
    return SteeringResult(pd.DataFrame(rows), layer, min(dictionaries), config.to_dict(), about)


def _by_head(sae: WriteSAE | Mapping[int, WriteSAE], head: int | None) -> dict[int, WriteSAE]:
    if isinstance(sae, WriteSAE):
        if head is None:
            raise ValueError("one dictionary needs the head that it steers; give head")
        return {head: sae}
    if head is not None:
        raise ValueError(f"the dictionaries name their heads, {sorted(sae)}, but head {head} was given too")
    if not sae:
        raise ValueError("there are no dictionaries to steer with")
    return dict(sae)


def wanted_tokens(model: HookedRecurrentModel, token: tuple[int, ...] | None) -> Int[Tensor, " token"]:
    """The given tokens in rising order, or every token whose text holds a newline."""
    if token is not None:
        for one in token:
            if not 0 <= one < model.cfg.d_vocab:
                raise IndexError(f"token {one} is out of range: the vocabulary has {model.cfg.d_vocab} tokens")
        return torch.tensor(sorted(set(token)))
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer to find newlines with; name the tokens")
    known = range(min(model.cfg.d_vocab, len(model.tokenizer)))
    found = [one for one in known if "\n" in model.tokenizer.decode([one])]
    if not found:
        raise ValueError("no token of the tokenizer holds a newline; name the tokens")
    return torch.tensor(found)


def _split(tokens: Int[Tensor, "passage pos"], config: SteeringConfig) -> tuple[Tensor, Tensor]:
    """(the passages on which atoms are chosen, the prompts)."""
    passages, length = tokens.shape
    if passages < config.prompts + 2:
        raise ValueError(
            f"{config.prompts} prompts need {config.prompts + 2} passages, two to choose atoms on; got {passages}"
        )
    need = max(config.prompt_length, config.first_position + 2)
    if length < need:
        raise ValueError(f"passages have {length} tokens; this test needs at least {need}")
    return tokens[: -config.prompts], tokens[-config.prompts :, : config.prompt_length]


@dataclass
class _Study:
    model: HookedRecurrentModel
    prompts: Int[Tensor, "prompt pos"]
    layer: int
    pushes: list[HeadPush]
    wanted: Int[Tensor, " token"]
    config: SteeringConfig
    told: Told | None

    def run(self) -> list[dict[str, Any]]:
        """A row per condition, dose and prompt, the unsteered run first."""
        conditions: list[tuple[str, float]] = [(BASELINE, 0.0)]
        conditions += [(name, dose) for dose in self.config.doses for name in (ATOMS, OTHER, GAUSSIAN)]
        native, rows = None, []
        for done, (name, dose) in enumerate(conditions):
            made = self._generate(self._edits(name, dose))
            native = made if native is None else native
            kls = self._on(native, name, dose)
            for prompt, text in enumerate(made):
                shared = {"condition": name, "dose": dose, "prompt": prompt}
                rows.append({**shared, **self._measured(text[self.prompts.shape[1] :]), **kls[prompt]})
            if self.told is not None:
                self.told(done + 1, len(conditions))
        return rows

    def _edits(self, name: str, dose: float, batch: int | None = None) -> list[StateEdit]:
        """The push of every head at all positions behind the prompt; the baseline adds nothing, which shows the floor."""
        edits = []
        for push in self.pushes:
            matrix = {
                BASELINE: push.atoms_matrix,
                ATOMS: push.atoms_matrix,
                OTHER: push.other,
                GAUSSIAN: push.gaussian,
            }[name]
            behind = slice(self.prompts.shape[1], None)
            more = {"matrix": dose * matrix, "batch": batch, "reading": "cache"}
            edits.append(StateEdit(self.layer, push.head, behind, "add", **more))  # type: ignore[arg-type]
        return edits

    def _generate(self, edits: list[StateEdit]) -> Int[Tensor, "prompt pos"]:
        how: dict[str, Any] = {"do_sample": not self.config.greedy, "seed": self.config.seed}
        if not self.config.greedy:
            how["temperature"] = self.config.temperature
        return self.model.generate(
            self.prompts, max_new_tokens=self.config.new_tokens, stop_at_eos=False, edits=edits, **how
        )

    def _on(self, native: Int[Tensor, "prompt pos"], name: str, dose: float) -> list[dict[str, float]]:
        """Per prompt both KLs on the unsteered continuation, where the push reaches the choice of its tokens.

        The first two are out of its reach: one follows the prompt, the next is chosen as the push is being added.
        """
        start = self.prompts.shape[1]
        found: dict[int, dict[str, float]] = {}
        for fork in run_edits(
            self.model, native, [self._edits(name, dose, batch=row) for row in range(len(native))], horizon=None
        ):
            text = native[fork.row]
            plain = self.model(text[None])[0, start + 1 : -1]
            told = compare(fork.logits[None, 1:-1], plain, text[start + 2 :])
            found[fork.row] = {kind: float(told[kind]) for kind in ("kl", "kl_reverse")}
        return [found[row] for row in range(len(native))]

    def _measured(self, made: Int[Tensor, " pos"]) -> dict[str, Any]:
        """Wanted tokens, newlines, paragraphs and mean word length of what was generated."""
        row: dict[str, Any] = {"tokens": int(torch.isin(made.cpu(), self.wanted).sum())}
        if self.model.tokenizer is None:
            return row
        text = str(self.model.to_string(made))
        words = text.split()
        length = sum(map(len, words)) / len(words) if words else float("nan")
        row |= {"newlines": text.count("\n"), "paragraphs": text.count("\n\n") + 1}
        return row | {"word_length": length, "text": text}
