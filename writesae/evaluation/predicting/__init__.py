"""The closed form: what adding an atom does to later logits, predicted and measured."""
