"""The cards of several small models side by side, as a Markdown table.

    python -m hooked_recurrent.zoo.compare
    python -m hooked_recurrent.zoo.compare runs/one runs/another

Every number is read from the records in the models' folders, as on the cards themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hooked_recurrent.zoo.bundled import bundled_models
from hooked_recurrent.zoo.card import EVALUATION_NAME, parameter_count, read_json, read_log
from hooked_recurrent.zoo.command import run_command
from hooked_recurrent.zoo.train import RECORD_NAME


def card_column(folder: Path) -> dict[str, str]:
    """What the card of one model says, a few words a row. Raises `ValueError` naming the record that is missing."""
    record = read_json(folder, RECORD_NAME, "it is written by python -m hooked_recurrent.zoo.train")
    evaluation = read_json(folder, EVALUATION_NAME, "it is written by python -m hooked_recurrent.zoo.evaluate")
    config, files = record["recipe"]["config"], evaluation["files"]
    mixer = config["mixer"]
    last = next(line for line in reversed(read_log(folder)) if "loss" in line)
    medians = sorted(row["median"] for row in evaluation["half_lives"])
    better = sum(file["bits"] < 8 * file["xz_bytes"] for file in files)
    return {
        "": record["recipe_name"],
        "rule": ", ".join(dict.fromkeys(config["layer_types"])),
        "parameters": f"{parameter_count(folder) / 1e6:.2f} M",
        "layers x heads": f"{len(config['layer_types'])} x {mixer['n_heads']}",
        "memory of a head": f"{mixer['d_k']} x {mixer['d_v']}",
        "MLP width": "none" if config["d_mlp"] is None else str(config["d_mlp"]),
        "trained on": f"{last['tokens'] / 1e6:.1f} M tokens",
        "**held-out bits per byte**": f"**{evaluation['bits_per_byte']:.3f}**",
        "`xz -9e`, each file by itself": f"{evaluation['xz_bits_per_byte_each_file']:.3f}",
        "`xz -9e`, all files joined": f"{evaluation['xz_bits_per_byte_joined']:.3f}",
        "files shorter than by xz": f"{better} of {len(files)}",
        "median half-life of a head, tokens": f"{medians[0]:.1f} to {medians[-1]:,.0f}",
        "heads with one above 16": f"{sum(median > 16 for median in medians)} of {len(medians)}",
    }


def side_by_side(folders: Sequence[Path]) -> str:
    """A Markdown table with a column per model folder."""
    columns: list[dict[str, Any]] = [card_column(folder) for folder in folders]
    head, *rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    rule = ["---", *["--:"] * len(columns)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def main(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Model folders; the shipped models when left out.")
    ] = None,
) -> None:
    """Print the cards of small models side by side."""
    print(side_by_side(folders or list(bundled_models().values())))


if __name__ == "__main__":
    run_command(main)
