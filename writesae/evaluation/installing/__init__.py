"""Writes that make the model say a word, against controls of equal norm and equal cost."""
