"""A text shaded by where atoms fire in it."""

from collections.abc import Sequence
from typing import Any

from hooked_recurrent.display import TokenView, tokens_html
from writesae.sae.codes import Codes


def atoms_html(
    tokens: Sequence[str], codes: Codes, atoms: Sequence[int] | None = None, *, top: int = 8, **options: Any
) -> TokenView:
    """Shade a text by the coefficients of some atoms, a button for each; by default those with the largest sums in it.

    Args:
        tokens: what each position says, such as `model.to_str_tokens(text)`.
        codes: the codes of these positions, indices and values [pos, k]; `codes[passage]` picks one text of several.
        atoms: which atoms.
        top: how many, where none are named.
        **options: as in `tokens_html`.

    Raises:
        ValueError: codes of more than one text, or of another number of tokens; a text in which nothing fires.
    """
    if codes.values.ndim != 2:
        raise ValueError(
            f"expected the codes of one text [pos, k], got {tuple(codes.values.shape)}: codes[passage] is one"
        )
    if atoms is None:
        atoms = codes.busiest(top)
        if not atoms:
            raise ValueError(
                "no atom fires in this text, so there is nothing to shade: name the atoms to see them silent"
            )
    return tokens_html(tokens, {f"atom {atom}": codes.of(atom) for atom in atoms}, **options)
