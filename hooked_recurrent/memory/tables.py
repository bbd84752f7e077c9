"""From tensors with named axes to a long pandas table, one row per entry."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor


def long_table(
    axes: Mapping[str, Sequence[int]], columns: Mapping[str, Tensor], keep: np.ndarray | None = None
) -> pd.DataFrame:
    """One row per entry, the last axis running fastest.

    Args:
        axes: per axis its name and the labels along it, in the order of the tensors' axes.
        columns: tensors of that shape.
        keep: a mask that broadcasts to that shape; the other rows are left out.
    """
    shape = tuple(len(labels) for labels in axes.values())
    rows = slice(None) if keep is None else np.broadcast_to(keep, shape).ravel()
    grids = np.meshgrid(*axes.values(), indexing="ij")
    table = {name: grid.ravel()[rows] for name, grid in zip(axes, grids, strict=True)}
    for name, column in columns.items():
        table[name] = column.detach().cpu().numpy().reshape(-1)[rows]
    return pd.DataFrame(table)
