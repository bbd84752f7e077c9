"""Results as rich tables, for a terminal."""

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:  # the command line draws its help without waiting for it
    import pandas as pd

READINGS = {"in_recurrence": "at t", "cache": "at t + 1", "horizon": "next ones"}
POOLS = {"listed": "listed", "dominant": "strongest"}
SCALES = {"norm": ", norm", "best": ", best"}
HEADLINE = ("dominant", "coef")


def models_table(rows: list[dict[str, Any]]) -> Table:
    """The bundled models."""
    table = Table(
        title="bundled models",
        caption="memory: d_k x d_v of every head; bpb: bits per byte on held-out files",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("name", "rule", "layers", "heads", "memory", "size", "bpb"):
        left = heading in ("name", "rule")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        bits = "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"
        sizes = (
            str(row["layers"]),
            str(row["heads"]),
            f"{row['d_k']} x {row['d_v']}",
            f"{row['parameters'] / 1e6:.2f} M",
        )
        table.add_row(row["name"], row["rule"], *sizes, bits)
    return table


def cells_table(cells: "pd.DataFrame", chosen: tuple[int, int]) -> Table:
    """The survey of the cells; the chosen one is bold."""
    table = Table(
        "layer", "head", "half-life", "write norm", "KL of deleting a write", title="cells (medians)", box=SIMPLE_HEAD
    )
    for row in cells.itertuples():
        style = "bold" if (row.layer, row.head) == chosen else None
        numbers = (f"{row.half_life:.1f}", f"{row.write_norm:.2f}", f"{row.deletion_kl:.2e}")
        table.add_row(str(row.layer), str(row.head), *numbers, style=style)
    return table


def caches_table(rows: list[dict[str, Any]]) -> Table:
    """Caches on disk, a row each."""
    table = Table("folder", "model", "sources", "passages", "size", title="caches", box=SIMPLE_HEAD)
    for row in rows:
        if row["problem"]:
            table.add_row(row["path"], f"[red]{row['problem']}[/red]")
            continue
        size = f"{row['bytes'] / 1e6:.1f} MB {row['dtype']}"
        table.add_row(row["path"], row["model"], "\n".join(row["sources"]), f"{row['passages']} of {row['of']}", size)
    return table


def quality_table(metrics: dict[str, dict[str, float]], title: str = "dictionary") -> Table:
    """What a dictionary leaves unexplained, and what that costs the model: a row per number, a column per text."""
    table = Table("", title=title, box=SIMPLE_HEAD)
    for text in metrics:
        table.add_column(text, justify="right")
    for name in dict.fromkeys(name for values in metrics.values() for name in values):
        cells = [values.get(name, "") for values in metrics.values()]
        table.add_row(
            name.replace("_", " "), *(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        )
    return table


def replacement_table(summary: list[dict[str, Any]], cell: tuple[int, int]) -> Table:
    """The replacement test: a row per reading, pool and scale, narrow enough for 80 columns."""
    floor = max(row["floor_max"] for row in summary)
    table = Table(
        title=f"replacement test, layer {cell[0]}, head {cell[1]}: {summary[0]['n']} firings",
        caption="A win: the atom moves the output less than deleting the write does. An atom stands at its coefficient, "
        "at the native write's norm, or (best) at the size that fits the write best. KL(edited || native): medians in nats. "
        "Intervals: bootstrap over passages. "
        f"The native write put back in its place: at most {floor:.0e} nats.",
        box=SIMPLE_HEAD,
    )
    for heading in ("logits", "atom", "wins", "95%", "KL atom", "delete", "random"):
        table.add_column(heading, justify="left" if heading in ("logits", "atom") else "right")
    before = None
    for row in summary:
        if before not in (None, row["reading"]):
            table.add_section()
        low, high = row["by_passage"]
        table.add_row(
            READINGS.get(row["reading"], row["reading"]) if row["reading"] != before else "",
            POOLS.get(row["pool"], row["pool"]) + SCALES.get(row["scale"], ""),
            f"{row['win_rate']:.1%}",
            f"{100 * low:.0f}-{100 * high:.0f}",
            *(f"{row[f'median_kl_{name}']:.1e}" for name in ("atom", "delete", "random")),
            style="bold" if (row["pool"], row["scale"]) == HEADLINE else None,
        )
        before = row["reading"]
    return table


def summary_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Any result's summary: a column per name, numbers to three digits, an interval as low to high."""
    table = Table(title=title, box=SIMPLE_HEAD)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        words = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name.replace("_", " "), justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def claims_table(claims: list[dict[str, Any]]) -> Table:
    """Which way effects point: a row per claim, those that fail in red."""
    table = Table("step", "claim", "measured", "", title="effects and their directions", box=SIMPLE_HEAD)
    for claim in claims:
        verdict = "yes" if claim["certain"] else "yes, by the estimate" if claim["holds"] else "no"
        table.add_row(claim["step"], claim["text"], claim["measured"], verdict, style=None if claim["holds"] else "red")
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(_cell(one) for one in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
