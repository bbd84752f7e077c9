"""Figures and the one-page report of a replacement test.

`write_report` is imported when it is first asked for: tables for a terminal need none of what draws figures.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writesae.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    if name == "write_report":
        from writesae.report.page import write_report

        return write_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
