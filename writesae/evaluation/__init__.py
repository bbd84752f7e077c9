"""The experiments: pure functions from (model, sae, tokens) to results.

replacing    what stands in a write's place: the replacement test, of one cell or all, atom by atom, over passages
comparing    what a dictionary is held against, at one budget
predicting   what adding an atom does to later logits, predicted and measured
installing   writes that make the model say a word
acting       what atoms do when erased, written, amplified, and who reads them
describing   what atoms are like, and what memories rebuilt from them cost
recovering   planted atoms found again

Beside them what all share: results, firings, low-rank matrices, the output after an edit, statistics, the survey of cells.
"""
