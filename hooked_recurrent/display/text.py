"""Text shown as text, whatever it holds.

A token may hold markup, scripts, control characters, or marks that turn the reading direction of everything after them.
Here each becomes something to look at: markup is escaped, control characters become their pictures (U+2400 and on), marks
that cannot be seen become their code point in a box. Spaces, tabs and line ends are shown too, because a memory that fires
on indentation should look as if it did.
"""

import unicodedata

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
    """One line of text with every unseen character as its picture; what a title, a label or a setting may show."""
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
