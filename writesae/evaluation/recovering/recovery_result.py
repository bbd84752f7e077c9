"""The outcome of a recovery experiment: a table with a row per variant, reading of its atoms and seed, and its summary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_recurrent.display import OneLine
from hooked_recurrent.files import write_text

MEASURES = ("recovered", "recovered_best", "mean_max_cosine", "fvu", "l0", "dead_fraction")
"""What the summary averages over seeds."""
_SETTING = ["planted", "variant", "atoms"]


@dataclass(frozen=True, repr=False)
class RecoveryResult(OneLine):
    """Every trained dictionary's score, with what is needed to run it again.

    Columns of the table: `planted` (name of what was planted), `variant`, `atoms` ("as learned", or "svd": the leading
    outer product of every dense atom), `seed`; `recovered` (share of planted atoms whose partner under the best
    one-to-one assignment has a cosine above the threshold), `recovered_best` (the same with the best learned atom,
    which may serve several), `mean_max_cosine` (mean of the best cosine of every planted atom), `fvu`, `l0` and
    `dead_fraction` on fresh samples, `n_learned`, `k`, `steps`, `seconds` of training.
    """

    table: pd.DataFrame
    """A row per dictionary and reading."""
    threshold: float
    """Cosine above which an atom counts as found."""
    config: dict[str, Any] = field(default_factory=dict)
    """What was planted, by name, and how the variants were trained."""

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def summary(self) -> list[dict[str, Any]]:
        """A row per planting, variant and reading: means over seeds, the worst seed's `recovered`, how many seeds."""
        rows = []
        for setting, group in self.table.groupby(_SETTING, sort=False):
            means = {name: float(group[name].mean()) for name in MEASURES}
            worst = float(group["recovered"].min())
            rows.append({**dict(zip(_SETTING, setting, strict=True)), **means, "worst": worst, "n_seeds": len(group)})
        return rows

    def to_markdown(self) -> str:
        """The summary as a table for a page."""
        lines = [
            "| planted | variant | atoms | recovered | worst seed | best match | mean max cosine | FVU | L0 | dead |",
            "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in self.summary():
            shares = [f"{row[name]:.1%}" for name in ("recovered", "worst", "recovered_best")]
            numbers = [f"{row['mean_max_cosine']:.3f}", f"{row['fvu']:.4f}", f"{row['l0']:.1f}"]
            cells = [*(row[name] for name in _SETTING), *shares, *numbers, f"{row['dead_fraction']:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_json(self, path: str | Path) -> Path:
        """Write everything, atomically."""
        path = Path(path)
        content = {
            "threshold": self.threshold,
            "config": self.config,
            "summary": self.summary(),
            "records": json.loads(self.table.to_json(orient="records", double_precision=15)),
        }
        write_text(path, json.dumps(content, indent=1))
        return path

    @classmethod
    def from_json(cls, path: str | Path) -> "RecoveryResult":
        """Read what `to_json` wrote; other keys of the file are left alone."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(pd.DataFrame(content["records"]), content["threshold"], content["config"])

    @staticmethod
    def joined(results: Sequence["RecoveryResult"]) -> "RecoveryResult":
        """Several results in one table.

        Raises `ValueError` for none, for different thresholds, and where one name stands for two plantings.
        """
        thresholds = sorted({result.threshold for result in results})
        if len(thresholds) != 1:
            raise ValueError(f"results must have one threshold in common, got {thresholds}")
        config: dict[str, Any] = {}
        for result in results:
            for name, about in result.config.items():
                before = config.setdefault(name, {"variants": {}, "train": {}})
                if before.setdefault("planted", about["planted"]) != about["planted"]:
                    raise ValueError(f"the results called {name!r} were planted differently")
                config[name] = {
                    **about,
                    **{part: {**before[part], **about[part]} for part in ("variants", "train")},
                }
        table = pd.concat([result.table for result in results], ignore_index=True)
        return RecoveryResult(table, thresholds[0], config)
