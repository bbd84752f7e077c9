"""What a reader may do to a write, and the edits of the model that do it.

Without an atom a change is about the whole write of a token:

    delete            the token writes nothing
    scale  amount     it writes its native write, times the amount

and with one about this atom's share in it, which is coefficient x A:

    replace (amount)  amount x A stands in the write's place; by default the atom's own coefficient there
    delete            the atom's share is taken out, and the rest stays
    scale  amount     the share is multiplied, and the rest stays
    add    amount     amount x A is written as well

The write is what the dictionary learned: k v^T alone, or with all that the token erased ("net"). An atom of a dictionary of
states fires on the state and stands, as in the paper, in the write's place; its share is taken out of the state. A net write
that is scaled is the untouched run's. Changes act in the order in which they are given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hooked_recurrent import WriteEdit
from hooked_recurrent.edits import Edit, Reading
from writesae.evaluation.acting.atom_edits import adding
from writesae.evaluation.replacing.exchange import exchange
from writesae.evaluation.replacing.substitutes import atom_of
from writesae.view.session import Prompt, Session, coefficient

OPS = ("replace", "delete", "scale", "add")
LARGEST = 1e6
"""Largest amount of a change, either way. Far beyond it a run ends in infinities, which help nobody."""


@dataclass(frozen=True)
class Change:
    """One thing done to the write of one token."""

    position: int
    """Which token, counted from 0."""
    op: str
    """What is done, one of `OPS`; see the module's docstring."""
    atom: int | None = None
    """Whose share it is about; None for the whole write."""
    amount: float | None = None
    """Coefficient for replace and add, factor for scale."""

    @property
    def where(self) -> str:
        """The change in words, for messages."""
        return f"{self.op} at token {self.position}" + ("" if self.atom is None else f", atom {self.atom}")


def check(session: Session, prompt: Prompt, change: Change) -> None:
    """Raise for a change that this text or dictionary does not have room for; nothing has run yet.

    IndexError for a token or atom that is not there; ValueError for an unknown op, an op without its atom or amount or with
    one too many, an amount that is not finite or beyond `LARGEST`, and an atom that is silent where its own share is meant.
    """
    last, n_atoms = prompt.tokens.shape[1] - 1, session.sae.config.n_atoms
    if change.op not in OPS:
        raise ValueError(f"unknown change {change.op!r}: the changes are {', '.join(OPS)}")
    if not 0 <= change.position <= last:
        raise IndexError(f"token {change.position} is not in this text, whose tokens are 0 to {last}")
    if change.atom is None:
        if change.op in ("replace", "add"):
            raise ValueError(f"{change.where} needs an atom: say which, 0 to {n_atoms - 1}")
    elif not 0 <= change.atom < n_atoms:
        raise IndexError(f"atom {change.atom} is not in this dictionary, whose atoms are 0 to {n_atoms - 1}")
    if change.amount is None:
        if change.op in ("scale", "add"):
            what = "factor to scale by" if change.op == "scale" else "coefficient"
            raise ValueError(f"{change.where} needs an amount: give the {what}")
    elif change.op == "delete":
        raise ValueError(f"{change.where} takes no amount, got {change.amount}: leave it out")
    elif not math.isfinite(change.amount) or abs(change.amount) > LARGEST:
        raise ValueError(f"the amount of {change.where} is {change.amount}: give a number between -1e6 and 1e6")
    own = change.op in ("delete", "scale") or (change.op == "replace" and change.amount is None)
    if change.atom is not None and own and coefficient(prompt, change.position, change.atom) == 0:
        instead = "replace the write with an amount of your own" if change.op == "replace" else "add it instead"
        raise ValueError(
            f"atom {change.atom} is silent at token {change.position}, so it has no share there: {instead}"
        )


def edits(
    session: Session, prompt: Prompt, changes: Sequence[Change], reading: Reading = "in_recurrence"
) -> tuple[Edit, ...]:
    """The model's edits for some changes, in their order.

    `reading` says whether the token's own query reads the change already ("in_recurrence"), or only what comes after it
    ("cache"). Raises as `check` does.
    """
    for change in changes:
        check(session, prompt, change)
    return tuple(edit for change in changes for edit in _edits(session, prompt, change, reading))


def _edits(session: Session, prompt: Prompt, change: Change, reading: Reading) -> Sequence[Edit]:
    place: dict[str, Any] = {"layer": session.layer, "head": session.head, "position": change.position}
    if change.atom is None:
        if change.op == "delete":
            return (WriteEdit(**place, op="delete", form=session.form, reading=reading),)
        assert change.amount is not None  # `check` saw to it
        if session.form == "additive":
            return (WriteEdit(**place, op="scale", scale=change.amount, reading=reading),)
        native = prompt.writes.native(0, change.position, "net")
        return exchange(**place, new=native.times(change.amount), form="net", reading=reading)
    own = coefficient(prompt, change.position, change.atom)
    if change.op == "replace":
        amount = own if change.amount is None else change.amount
        atom = atom_of(session.sae, change.atom, "leading").to(session.model.device)
        return exchange(**place, new=atom.times(amount), form=session.form, reading=reading)
    given = 0.0 if change.amount is None else change.amount
    extra = {"add": given, "scale": (given - 1.0) * own, "delete": -own}[change.op]
    return adding(session.sae, change.atom, extra, **place, reading=reading)
