"""The rows of docs/results.md: every figure of the paper (arXiv:2605.12770), and where ours stands."""

from collections.abc import Iterator

from writesae.reproduce.rows import Row

GDN, MAMBA, RWKV = "gated_delta_net", "mamba2", "rwkv7"


def _replacement() -> Iterator[Row]:
    paper = {GDN: "92.4% (91.6 to 93.1), n = 4,851", MAMBA: "88.1% (86.8 to 89.3), n = 2,500", RWKV: "45.3%, n = 6,591"}
    words = {"in_recurrence": "at t", "cache": "at t + 1, through the cache", "horizon": "mean of the next 16"}
    for variant, atoms in {"best": "best dictionary", "write": "write dictionary", "state": "state dictionary"}.items():
        for reading, when in words.items():
            where = {"variant": variant, "reading": reading, "pool": "dominant", "scale": "coef"}
            yield Row(
                "replacement", f"atom beats deletion {when}, {atoms}", "win_rate", where, "by_passage",
                paper=paper if (variant, reading) == ("state", "cache") else {}, above=0.5,
            )  # fmt: skip


ROWS: tuple[Row, ...] = (*_replacement(),)
"""All rows, in the order of the page."""
