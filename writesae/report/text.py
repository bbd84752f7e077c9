"""Text from a corpus shown as text, whatever it holds.

A context is a few tokens of somebody's file. It may hold markup, scripts, control characters, or marks that turn the
reading direction of everything after them. Here each becomes something to look at: markup is escaped, control
characters become their pictures (U+2400 and on), marks that cannot be seen become their code point in a box, and each
token is isolated, so that right-to-left text cannot reorder its neighbours. Spaces, tabs and line ends are shown too,
because a memory that fires on indentation should look as if it did.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_JOINER = "\u200d"


def picture(character: str) -> str | None:
    """What stands for a character that shows nothing itself: "␀" for NUL, "U+202E" for a direction mark; else None."""
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in _UNSEEN:
        return f"U+{code:04X}"
    return None


def plain(text: str) -> str:
    """One line of text with every unseen character as its picture; what a title, a file name or a setting may show."""
    return "".join(picture(character) or character for character in text)


def _is_emoji_joiner(text: str, index: int) -> bool:
    """Whether this zero-width joiner holds an emoji together; taken out, a family would fall apart into people."""
    around = text[max(0, index - 1) : index + 2]
    return text[index] == _JOINER and len(around) == 3 and all(ord(character) > 0x2000 for character in around)


def visible(text: str) -> Markup:
    """Text as markup in which whitespace and unseen characters show. Spaces stay spaces: style makes them dots."""
    parts = []
    for index, character in enumerate(text):
        if character == " ":
            parts.append('<i class="sp"> </i>')
        elif character == "\n":
            parts.append('<i class="nl">↵</i>\n')
        elif character == "\t":
            parts.append('<i class="tab">⇥</i>')
        elif (shown := picture(character)) is None or _is_emoji_joiner(text, index):
            parts.append(str(escape(character)))
        else:
            style = "ctl pic" if len(shown) == 1 else "ctl"  # the pictures are drawn small in every font
            parts.append(f'<i class="{style}" title="U+{ord(character):04X}">{shown}</i>')
    return Markup("".join(parts))


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
