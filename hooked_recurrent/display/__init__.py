"""What a notebook shows: one line for a terminal, a small table or a shaded text for a cell.

    brief, OneLine      a line instead of pages of numbers
    tokens_html         a text whose tokens are shaded by numbers, several rows of them to choose from
    next_tokens_html    the likeliest next tokens, before and after a change
    stack               several of these, one below the other
    matrix_map          one write, state or atom as a heat map

HTML made here loads nothing and needs no script. It takes its colours from the page around it, so that it reads in light and
in dark, and whatever a text holds is shown as text.
"""

from hooked_recurrent.display.figures import matrix_map
from hooked_recurrent.display.lines import OneLine, brief
from hooked_recurrent.display.next_tokens import NextTokens, next_tokens_html
from hooked_recurrent.display.stack import Stack, stack
from hooked_recurrent.display.tokens import TokenView, tokens_html

__all__ = [
    "NextTokens",
    "OneLine",
    "Stack",
    "TokenView",
    "brief",
    "matrix_map",
    "next_tokens_html",
    "stack",
    "tokens_html",
]
