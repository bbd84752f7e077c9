"""What changes of a few writes do to the next-token distributions, and to the text that follows.

Both runs are full passes over the same tokens; the edited one takes the model's own edits. Distributions and KLs are in float64
from the model's logits, KL(edited || untouched) in nats.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.edits import Reading
from writesae.view.changes import Change, edits
from writesae.view.session import Prompt, Session, words

ROWS_AT_ONCE = 1 << 22
"""Logits that are made float64 at once: 32 MB."""


def kl_along(edited: Float[Tensor, "pos d_vocab"], plain: Float[Tensor, "pos d_vocab"]) -> Float[Tensor, " pos"]:
    """KL(edited || plain) of every position in nats, float64, a few positions at a time."""
    at_once = max(1, ROWS_AT_ONCE // plain.shape[1])
    parts = []
    for one, other in zip(edited.split(at_once), plain.split(at_once), strict=True):
        after, before = one.double().log_softmax(-1), other.double().log_softmax(-1)
        parts.append((after.exp() * (after - before)).sum(-1))
    return torch.cat(parts)


@torch.no_grad()
def distributions(
    session: Session,
    prompt: Prompt,
    changes: Sequence[Change],
    *,
    position: int | None = None,
    top: int = 10,
    reading: Reading = "in_recurrence",
) -> dict[str, Any]:
    """The next-token distributions with and without the changes.

    Args:
        session, prompt: see `session.read`.
        changes: all act together.
        position: a token whose distribution is wanted besides those of t, the first changed one, and of t + 1; the last one by
            default.
        top: how many tokens of each list.
        reading: see `changes.edits`.

    Returns:
        {"kl": [nats at every position], "first": t or None, "at": [...]}, and in "at" for t, t + 1 (where the text has it) and
        the wanted position, each once: position, roles, kl, `top` (the likeliest before and after), `promoted` and `suppressed`
        (whose probability rose or fell most), each entry {"id", "text", "before", "after"} with probabilities.

    Raises:
        IndexError, ValueError: before anything runs, for a position or change that does not fit.
    """
    length = prompt.tokens.shape[1]
    wanted = length - 1 if position is None else position
    if not 0 <= wanted < length:
        raise IndexError(f"token {wanted} is not in this text, whose tokens are 0 to {length - 1}")
    if not 1 <= top <= session.model.cfg.d_vocab:
        raise ValueError(f"top must be between 1 and the {session.model.cfg.d_vocab} tokens there are, got {top}")
    made = edits(session, prompt, changes, reading)
    after = session.model(prompt.tokens, edits=made)[0] if made else prompt.logits
    first = min((change.position for change in changes), default=None)
    roles: dict[int, list[str]] = {}
    if first is not None:
        roles[first] = ["t"]
        if first + 1 < length:
            roles[first + 1] = ["t + 1"]
    roles.setdefault(wanted, []).append("chosen" if position is not None else "last")
    kl = kl_along(after, prompt.logits).tolist()
    found = [
        {
            "position": place,
            "roles": names,
            "kl": kl[place],
            **compared(session, prompt.logits[place], after[place], top),
        }
        for place, names in sorted(roles.items())
    ]
    return {"kl": kl, "first": first, "at": found}


def compared(
    session: Session, plain: Float[Tensor, " d_vocab"], edited: Float[Tensor, " d_vocab"], top: int
) -> dict[str, list[dict[str, Any]]]:
    """The likeliest tokens of two distributions together, and those whose probability rose and fell most."""
    before, after = plain.double().softmax(-1), edited.double().softmax(-1)
    change = after - before
    likeliest = dict.fromkeys([*before.topk(top).indices.tolist(), *after.topk(top).indices.tolist()])

    def entries(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "id": token,
                "text": session.model.to_string([token]),
                "before": float(before[token]),
                "after": float(after[token]),
            }
            for token in ids
        ]

    risen = [token for token in change.topk(top).indices.tolist() if change[token] > 0]
    fallen = [token for token in (-change).topk(top).indices.tolist() if change[token] < 0]
    return {"top": entries(list(likeliest)), "promoted": entries(risen), "suppressed": entries(fallen)}


def continuations(
    session: Session,
    prompt: Prompt,
    changes: Sequence[Change],
    *,
    new_tokens: int = 20,
    sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    reading: Reading = "in_recurrence",
) -> dict[str, Any]:
    """What the model writes next, untouched and with the changes; greedily, or drawn with one seed for both.

    Returns:
        {"plain": [{"id", "text"}, ...], "edited": [...], "same": how many tokens both begin with}.

    Raises:
        IndexError, ValueError: for a change or a setting that does not fit.
    """
    options: dict[str, Any] = {"do_sample": sample, "temperature": temperature, "seed": seed if sample else None}
    made = edits(session, prompt, changes, reading)
    plain = _continued(session, prompt, new_tokens, options)
    edited = _continued(session, prompt, new_tokens, options | {"edits": made}) if made else plain
    same = 0
    for one, other in zip(plain, edited, strict=False):
        if one["id"] != other["id"]:
            break
        same += 1
    return {"plain": plain, "edited": edited, "same": same}


def _continued(session: Session, prompt: Prompt, new_tokens: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    whole: Int[Tensor, "one pos"] = session.model.generate(prompt.tokens, new_tokens, return_type="tokens", **options)
    fresh = whole[0, prompt.tokens.shape[1] :].tolist()
    return [{"id": token, "text": word} for token, word in zip(fresh, words(session.model, fresh), strict=True)]
