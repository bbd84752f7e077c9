"""Figures and the one-page report of a replacement test."""

from writesae.report.page import write_report

__all__ = ["write_report"]
