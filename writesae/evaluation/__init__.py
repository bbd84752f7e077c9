"""The experiments: pure functions from (model, sae, tokens) to results."""
