"""Planted atoms found again."""
