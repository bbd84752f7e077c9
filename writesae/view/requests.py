"""What a request may ask for: its fields, their bounds, and the one sentence that says why it was refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import ErrorDetails

from writesae.view.changes import LARGEST, OPS, Change

MOST_CHARACTERS = 4000
MOST_TOKENS = 512
MOST_CHANGES = 32
MOST_NEW_TOKENS = 100
MOST_TOP = 50
LARGEST_BODY = 1 << 16
"""Bytes of a request's body: the longest text with every character escaped, and the changes."""

BOUNDS = {
    "characters": MOST_CHARACTERS,
    "tokens": MOST_TOKENS,
    "changes": MOST_CHANGES,
    "new_tokens": MOST_NEW_TOKENS,
    "top": MOST_TOP,
}
"""The same by name, for a page to say."""

Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
Amount = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]


class Strict(BaseModel):
    """Base of all bodies: no other field than those named, no text for a number, no number that is not finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ChangeAsked(Strict):
    """One change to one token's write; see `changes.Change`."""

    position: Annotated[int, Field(ge=0, lt=MOST_TOKENS)]
    op: Literal["replace", "delete", "scale", "add"]
    atom: Annotated[int, Field(ge=0)] | None = None
    amount: Amount | None = None

    def change(self) -> Change:
        """The same as the session knows it."""
        return Change(self.position, self.op, self.atom, self.amount)


class ReadAsked(Strict):
    """A text to be read."""

    text: Text


class Changed(ReadAsked):
    """A text and changes to its writes."""

    changes: Annotated[list[ChangeAsked], Field(max_length=MOST_CHANGES)] = []
    reading: Literal["in_recurrence", "cache"] = "in_recurrence"


class DistributionsAsked(Changed):
    """What the changes do to the next-token distributions; see `outcome.distributions`."""

    position: Annotated[int, Field(ge=0, lt=MOST_TOKENS)] | None = None
    top: Annotated[int, Field(ge=1, le=MOST_TOP)] = 10


class ContinuationsAsked(Changed):
    """What the model writes next; see `outcome.continuations`."""

    new_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] = 20
    sample: bool = False
    temperature: Annotated[float, Field(ge=0.05, le=10)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


assert set(OPS) == set(ChangeAsked.model_fields["op"].annotation.__args__)  # type: ignore[union-attr]


def sentence(error: ErrorDetails) -> str:
    """The first thing that is wrong with a body, in one sentence: which field, what was expected, what came."""
    place = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] in ("json_invalid", "model_attributes_type") or not place:
        return "the body of the request is not the JSON object that was expected"
    if error["type"] == "extra_forbidden":
        return f"there is no field {_short(place[-1])}: leave it out"
    if error["type"] == "missing":
        return f"the field {'.'.join(place)} is missing: give it"
    if error["type"] == "string_too_long":
        return f"the prompt has {len(error['input']):,} characters: give at most {MOST_CHARACTERS:,}"
    if error["type"] == "string_too_short":
        return "the prompt is empty: type some text first"
    if error["type"] == "string_unicode":
        return "the prompt holds half of a surrogate pair, which is no character: take it out"
    words = error["msg"].removeprefix("Input ")
    return f"the field {'.'.join(place)} {words}, got {_short(error['input'])}"


def _short(value: object) -> str:
    """What came, as far as a sentence has room for it."""
    if isinstance(value, list | dict):
        return f"{len(value)} entries"
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
