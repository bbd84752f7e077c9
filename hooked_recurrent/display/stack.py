"""Several views as one: a notebook shows only the last value of a cell, and this is it."""

from typing import Any

from markupsafe import Markup

from hooked_recurrent.display.html import card


class Stack:
    """Views one below the other, each with its own `_repr_html_`."""

    def __init__(self, views: tuple[Any, ...], title: str):
        self.views, self.title = views, title

    def __len__(self) -> int:
        return len(self.views)

    def __repr__(self) -> str:
        """One line: how many there are, and the first of them."""
        first = f", first {self.views[0]!r}" if self.views else ""
        return f"Stack({len(self.views)} views{first})"

    def __str__(self) -> str:
        return self._repr_html_()

    def _repr_html_(self) -> str:
        """All of them in order."""
        return card(self.title, parts=[Markup(view._repr_html_()) for view in self.views])


def stack(*views: Any, title: str = "") -> Stack:
    """One view of several; `TypeError` for something that a notebook would not show as HTML."""
    for view in views:
        if not hasattr(view, "_repr_html_"):
            raise TypeError(f"a stack is made of views with a _repr_html_, got {type(view).__name__}")
    return Stack(views, title)
