"""What an edit did to the output distribution."""

from jaxtyping import Float, Int
from torch import Tensor


def compare(
    edited: Float[Tensor, "row pos d_vocab"], plain: Float[Tensor, "pos d_vocab"], target: Int[Tensor, " pos"]
) -> dict[str, Float[Tensor, " row"]]:
    """What an edit did to the output distribution, averaged over positions: see the keys.

    kl and kl_reverse in nats; flip, the rate at which the most likely token changed; logprob (nats) and rank of the token
    that truly came next.
    """
    after, before = edited.double().log_softmax(-1), plain.double().log_softmax(-1)
    place = target[None, :, None].expand(len(edited), -1, 1)
    truth = after.gather(-1, place)
    return {
        "kl": (after.exp() * (after - before)).sum(-1).mean(-1),
        "kl_reverse": (before.exp() * (before - after)).sum(-1).mean(-1),
        "flip": (after.argmax(-1) != before.argmax(-1)).double().mean(-1),
        "logprob": truth[..., 0].mean(-1),
        "rank": (after > truth).sum(-1).double().mean(-1),
    }
