"""Results as rich tables, for a terminal."""

from typing import Any

import pandas as pd
from rich.table import Table

READINGS = {"in_recurrence": "at t", "cache": "cache, at t + 1", "horizon": "mean of the next tokens"}


def models_table(rows: list[dict[str, Any]]) -> Table:
    """The bundled models."""
    table = Table(title="bundled models", caption="bits per byte: on held-out files of the Python standard library")
    for heading in ("name", "family", "layers", "d_model", "heads", "d_k x d_v", "parameters", "bits per byte"):
        table.add_column(heading, justify="left" if heading in ("name", "family") else "right")
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"
        sizes = [str(row[key]) for key in ("layers", "d_model", "heads")]
        shape = f"{row['d_k']} x {row['d_v']}"
        table.add_row(row["name"], row["family"], *sizes, shape, f"{row['parameters'] / 1e6:.2f} M", bits)
    return table


def cells_table(cells: pd.DataFrame, chosen: tuple[int, int]) -> Table:
    """The survey of the cells; the chosen one is bold."""
    table = Table("layer", "head", "half-life", "write norm", "KL of deleting a write", title="cells (medians)")
    for row in cells.itertuples():
        style = "bold" if (row.layer, row.head) == chosen else None
        numbers = (f"{row.half_life:.1f}", f"{row.write_norm:.2f}", f"{row.deletion_kl:.2e}")
        table.add_row(str(row.layer), str(row.head), *numbers, style=style)
    return table


def quality_table(metrics: dict[str, dict[str, float]]) -> Table:
    """What the dictionary leaves unexplained, on training and held-out writes."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    table = Table("text", *(name.replace("_", " ") for name in names), title="dictionary")
    for text, values in metrics.items():
        table.add_row(text, *(f"{values[name]:.4g}" if name in values else "" for name in names))
    return table


def replacement_table(summary: list[dict[str, Any]], cell: tuple[int, int]) -> Table:
    """The replacement test: a row per reading, pool and scale."""
    table = Table(
        title=f"replacement test, layer {cell[0]}, head {cell[1]}: {summary[0]['n']} firings of {summary[0]['n_atoms']} atoms",
        caption="KL(edited || native) in nats, medians; the interval of the win rate is a bootstrap over passages",
    )
    for heading in ("logits", "atom", "scale", "atom beats deletion", "KL atom", "delete", "random", "floor"):
        table.add_column(heading, justify="left" if heading in ("logits", "atom", "scale") else "right")
    for row in summary:
        low, high = row["by_passage"]
        table.add_row(
            READINGS.get(row["reading"], row["reading"]),
            row["pool"],
            "coefficient" if row["scale"] == "coef" else "native norm",
            f"{row['win_rate']:.1%} [{low:.1%}, {high:.1%}]",
            *(f"{row[f'median_kl_{name}']:.2e}" for name in ("atom", "delete", "random")),
            f"{row['floor_max']:.0e}",
        )
    return table
