"""What transformer_lens takes as a slice of an axis: an int (which drops it), a list, a tuple, a tensor, None or a Slice."""

from typing import Any

from transformer_lens.utilities import Slice


def as_slice(wanted: Any) -> Slice:
    """transformer_lens's Slice of any of these; 3.9 knows no integers but Python's, so others are made so."""
    if isinstance(wanted, Slice):
        return wanted
    whole = getattr(wanted, "ndim", None) == 0 and not isinstance(wanted, bool)
    return Slice(int(wanted) if whole else wanted)
