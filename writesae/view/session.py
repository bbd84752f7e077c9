"""A text as one cell of a model reads it: tokens, native writes, and the atoms that fire on each.

Everything here is a pure function of a session (model, dictionary, cell) and a text, and gives plain values that JSON can hold,
so that the page, a notebook and a test see the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.edits import Form
from hooked_recurrent.text import TextPieces
from writesae.evaluation.firings import CellWrites, check_cell, encode_cell, trained_on
from writesae.sae.write_sae import WriteSAE

MOST_ATOMS = 64
"""Most firings of one token that are told; a dictionary without a fixed number of atoms may have hundreds."""


@dataclass(frozen=True)
class Session:
    """A model, a dictionary of one of its cells, and nothing else: the ground that every request stands on."""

    model: HookedRecurrentModel
    """The language model; it needs a tokenizer."""
    sae: WriteSAE
    """The dictionary, of writes, net writes or states."""
    layer: int
    """Layer of the cell."""
    head: int
    """Its head."""

    def __post_init__(self) -> None:
        if self.model.tokenizer is None:
            raise ValueError(f"the model has no tokenizer to read a prompt with: {self.model.without_tokenizer}")
        check_cell(self.model, self.sae, self.layer, self.head)

    @property
    def form(self) -> Form:
        """What "the write" of a token is: "additive", or "net" where the dictionary learned writes with their erase."""
        return cast(Form, trained_on(self.sae, self.layer, self.head).form)

    @property
    def learned(self) -> Literal["write", "net write", "state"]:
        """What the dictionary's codes are codes of."""
        if trained_on(self.sae, self.layer, self.head).hook.endswith("hook_state"):
            return "state"
        return "net write" if self.form == "net" else "write"

    def about(self) -> dict[str, Any]:
        """What a page says of the session: model, rule, cell and the dictionary's sizes."""
        config = self.sae.config
        return {
            "model": self.model.cfg.model_name,
            "rule": self.model.cfg.layer_types[self.layer],
            "layer": self.layer,
            "head": self.head,
            "learned": self.learned,
            "dense": config.decoder == "dense",
            "n_atoms": config.n_atoms,
            "d_k": config.d_k,
            "d_v": config.d_v,
            "d_vocab": self.model.cfg.d_vocab,
        }


@dataclass(frozen=True)
class Prompt:
    """One text as the untouched model reads it; kept, it serves every edit of that text."""

    text: str
    """What was typed."""
    tokens: Int[Tensor, "one pos"]
    """Its tokens, behind the tokenizer's own first one where it has one."""
    words: list[str]
    """Each token as text, see `words`."""
    writes: CellWrites
    """The cell's native writes, additive and net, and the codes."""
    logits: Float[Tensor, "pos d_vocab"]
    """Of the untouched run."""

    def native_norm(self, position: int, form: Form) -> float:
        """Frobenius norm of what a token wrote, in the units of the model's memory."""
        return self.writes.native(0, position, form).norm()


def session(model: HookedRecurrentModel, sae: WriteSAE, layer: int | None = None, head: int | None = None) -> Session:
    """A session on the cell that the dictionary was trained on, or on another one that its atoms fit.

    Raises:
        ValueError: for a dictionary that does not say its cell, one of vectors, one whose atoms have another shape than the
            model's writes, and a model without a tokenizer.
        IndexError: for a layer or head without writes.
    """
    places: dict[str, int] = {}
    for name, given in (("layer", layer), ("head", head)):
        found = sae.provenance.get(name) if given is None else given
        if found is None:
            raise ValueError(f"the dictionary does not say which {name} it was trained on: give one as {name}=0")
        places[name] = int(found)
    return Session(model, sae, **places)


def tokens_of(model: HookedRecurrentModel, text: str) -> Int[Tensor, "one pos"]:
    """The tokens of a text as the model would read it. `ValueError` where there is none, or half a character."""
    if not text:
        raise ValueError("the prompt is empty: type some text first")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the prompt holds half of a surrogate pair, which is no character: take it out") from None
    tokens = model.to_tokens(text)
    if tokens.shape[1] == 0:
        raise ValueError("the tokenizer makes no token of this prompt: type some other text")
    return tokens


@torch.no_grad()
def read(session: Session, text: str) -> Prompt:
    """Read a text once: its tokens, the cell's writes and codes, and the logits.

    Raises `ValueError` for a text without tokens.
    """
    tokens = tokens_of(session.model, text)
    writes = encode_cell(session.model, session.sae, tokens, session.layer, session.head, net=True)
    return Prompt(text, tokens, words(session.model, tokens[0].tolist()), writes, session.model(tokens)[0])


def words(model: HookedRecurrentModel, tokens: Sequence[int]) -> list[str]:
    """Each token as text; a character made of several tokens stands at its last one, and the others are empty.

    Decoded by themselves such tokens would all be the same replacement character.
    """
    pieces = TextPieces(model.tokenizer, [])
    found = [pieces.add(token) for token in tokens]
    if found and not found[-1]:
        found[-1] = pieces.rest()
    return found


def firings(prompt: Prompt, position: int) -> list[tuple[int, float]]:
    """The atoms active at a token with their coefficients, in the write's own units, the strongest first."""
    codes = prompt.writes.codes
    pairs = zip(codes.indices[0, position].tolist(), codes.values[0, position].tolist(), strict=True)
    return [(atom, value) for atom, value in pairs if value > 0]


def coefficient(prompt: Prompt, position: int, atom: int) -> float:
    """An atom's coefficient at a token; 0 where it is silent."""
    return dict(firings(prompt, position)).get(atom, 0.0)


def told(session: Session, prompt: Prompt) -> dict[str, Any]:
    """What the page shows of a text: every token with its write's norm and its firings.

    Returns:
        {"tokens": [{"id", "text", "norm", "n_active", "atoms": [[atom, coefficient], ...]}, ...]}; at most `MOST_ATOMS` firings
        a token, and in n_active how many there are.
    """
    rows = []
    for position, (token, word) in enumerate(zip(prompt.tokens[0].tolist(), prompt.words, strict=True)):
        active = firings(prompt, position)
        rows.append(
            {
                "id": token,
                "text": word,
                "norm": prompt.native_norm(position, session.form),
                "n_active": len(active),
                "atoms": [[atom, value] for atom, value in active[:MOST_ATOMS]],
            }
        )
    return {"tokens": rows}
