"""A context of a firing as markup: its tokens, whatever they hold, shaded by activation.

What makes hostile and invisible text visible is `hooked_recurrent.display.text`; each token is isolated besides, so that
right-to-left text cannot reorder its neighbours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from hooked_recurrent.display.text import plain, visible

__all__ = ["context_markup", "plain", "visible"]


def context_markup(context: Mapping[str, Any], largest: float) -> Markup:
    """The tokens of one context, shaded by activation, the firing token marked.

    Args:
        context: `tokens` (strings), `weights` (the atom's activation at each, the same number of them) and
            `firing_index` (which token the context is about).
        largest: The activation drawn at full strength; the largest of the atom's contexts, so that they compare.

    Raises:
        ValueError: tokens and weights differ in number, or firing_index names no token.
    """
    tokens: Sequence[str] = context["tokens"]
    weights: Sequence[float] = context["weights"]
    firing = context["firing_index"]
    if len(tokens) != len(weights):
        raise ValueError(f"a context has {len(tokens)} tokens but {len(weights)} weights; give one weight per token")
    if not 0 <= firing < len(tokens):
        raise ValueError(f"firing_index is {firing}, but the context has {len(tokens)} tokens")
    parts = []
    for index, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        strength = min(1.0, max(0.0, float(weight) / largest)) if largest > 0 else 0.0
        shade = f' style="--a:{strength:.2f}" title="{float(weight):.3g}"' if strength >= 0.005 else ""
        shown = visible(token)
        # A frame around a token that ends a line would reach into the next one, so the break itself stands outside.
        line_break = "\n" if shown.endswith("\n") else ""
        framed = f"<bdi{shade}>{shown.removesuffix(line_break)}</bdi>"
        parts.append((f"<mark>{framed}</mark>" if index == firing else framed) + line_break)
    return Markup("".join(parts))
