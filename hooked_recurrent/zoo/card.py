"""The card of a small model: a README.md beside its weights, written from what the run and the evaluation recorded.

    python -m hooked_recurrent.zoo.card runs/tiny-gated-deltanet

Every number on the card is read from `config.json`, `training.json`, `training_log.jsonl` and `evaluation.json` of the
folder, so a card cannot say what was not measured. The loss curve is an SVG of a few kilobytes.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import safe_open

from hooked_recurrent.files import write_text
from hooked_recurrent.zoo.command import run_command
from hooked_recurrent.zoo.corpus import HELDOUT_ONE_IN
from hooked_recurrent.zoo.train import LOG_NAME, RECORD_NAME

CURVE_NAME = "loss_curve.svg"
EVALUATION_NAME = "evaluation.json"
CURVE_POINTS = 200
# Whose classes load a folder of this model type, where it is not transformers.
LIBRARIES = {"rwkv7": "flash-linear-attention"}


def read_json(folder: Path, name: str, hint: str) -> dict[str, Any]:
    """One JSON file of the model folder; `ValueError` that says which command writes it when it is missing."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: {hint}")
    return json.loads(path.read_text(encoding="utf-8"))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of the training log; `ValueError` when there is none."""
    path = Path(folder) / LOG_NAME
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: it is written by python -m hooked_recurrent.zoo.train")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def thin(lines: list[dict[str, Any]], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """(tokens, loss) averaged over groups of neighbouring log lines, at most `points` of them."""
    size = -(-len(lines) // points)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)] if lines else []
    return [(group[-1]["tokens"], sum(line["loss"] for line in group) / len(group)) for group in groups]


def draw_loss_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss in nats per token against tokens read, as a small SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = [(tokens / 1e6, loss) for tokens, loss in thin([line for line in log if "loss" in line])]
    heldout = [(line["tokens"] / 1e6, line["heldout_loss"]) for line in log if "heldout_loss" in line]
    with matplotlib.rc_context({"svg.hashsalt": "loss curve", "font.size": 9, "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(5.6, 3.0), layout="constrained")
        axes.plot(*zip(*trained, strict=True), color="#8899aa", linewidth=1, label="training windows")
        if heldout:
            axes.plot(*zip(*heldout, strict=True), "o-", color="#c0392b", markersize=3, label="held-out sample")
        axes.set(
            xlabel="million tokens read", ylabel="nats per token", ylim=(0, min(max(loss for _, loss in trained), 6))
        )
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        temporary = path.with_name(path.name + ".tmp")
        figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    temporary.replace(path)


def parameter_count(folder: Path) -> int:
    """Number of weights in the folder's `model.safetensors`, read from its header; a tied matrix is stored once."""
    total = 0
    with safe_open(Path(folder) / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            size = 1
            for side in file.get_slice(name).get_shape():
                size *= side
            total += size
    return total


def half_life_summary(rows: list[dict[str, Any]]) -> str:
    """One sentence: the range of the heads' median half-lives, and how many are above 16 tokens."""
    medians = sorted(row["median"] for row in rows)
    above = sum(median > 16 for median in medians)
    return (
        f"Median half-lives run from {medians[0]:.1f} to {medians[-1]:.1f} tokens; "
        f"{above} of {len(medians)} heads have one above 16."
    )


def half_life_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of every head's half-life in tokens."""
    lines = [
        "| layer | head | lower quartile | median | upper quartile | of mean log-decay |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        numbers = (row["lower_quartile"], row["median"], row["upper_quartile"], row["of_mean_log_decay"])
        lines.append(f"| {row['layer']} | {row['head']} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


def weights_sentence(model_type: str) -> str:
    """Which layout the weights have, and who else loads it."""
    library = LIBRARIES.get(model_type, "transformers")
    return f"The weights are in the layout `{model_type}` of {library},\nwhich loads them too."


def score_section(evaluation: dict[str, Any]) -> str:
    """Held-out bits per byte beside the two yardsticks."""
    files = evaluation["files"]
    n_bytes = sum(file["n_bytes"] for file in files)
    n_tokens = sum(file["n_tokens"] for file in files)
    better = sum(file["bits"] < 8 * file["xz_bytes"] for file in files)
    return f"""## Held-out bits per byte

| code | bits per byte |
|---|--:|
| **this model** | **{evaluation["bits_per_byte"]:.3f}** |
| `xz -9e`, each file by itself | {evaluation["xz_bits_per_byte_each_file"]:.3f} |
| `xz -9e`, all held-out files joined in name order | {evaluation["xz_bits_per_byte_joined"]:.3f} |

Measured on {len(files)} files ({n_bytes:,} bytes, {n_tokens:,} tokens, {n_bytes / n_tokens:.2f} bytes per token;
fingerprint `{evaluation["fingerprint"]}`, Python {evaluation["python"]}). Each file is read from `<|endoftext|>` on,
with the state carried through the whole file, and pays for its own end. The model's code is shorter than xz's of the
same file on {better} of the {len(files)} files. xz starts from nothing; the model has read other files of the same
library first."""


def training_section(record: dict[str, Any], log: list[dict[str, Any]]) -> str:
    """Data, recipe and machine of the run."""
    recipe, data, machine = record["recipe"], record["data"], record["machine"]
    last = next(line for line in reversed(log) if "loss" in line)
    return f"""## Data

The `.py` files of the standard library of Python {data["python"]}, test suites included: {data["files"]:,} files,
{data["bytes"]:,} bytes, {data["tokens"]:,} tokens (fingerprint `{data["fingerprint"]}`). Left out because they do not
decode: {data["undecodable"]} files. The split is by file: SHA-256 of the file's name relative to the library, modulo
{HELDOUT_ONE_IN}; remainder 0 is held out. Test suites are never held out, since many distributions do not ship them.

Tokenizer: byte-level BPE of {recipe["config"]["d_vocab"]:,} pieces, learned on the training files without the test
suites. A line break and the indent after it are one piece. `<|endoftext|>` (id 0) comes before every file.

## Training

- {last["step"]:,} steps of {recipe["batch"]} windows of {recipe["seq_len"]:,} tokens: {last["tokens"]:,} tokens, or
  {last["tokens"] / data["tokens"]:.1f} times the training text, in {last["seconds"] / 60:.0f} minutes.
- Muon (rate {recipe["muon_lr"]:g}, momentum 0.95, weight decay {recipe["weight_decay"]:g}) on the matrices inside the
  blocks; AdamW (rate {recipe["adam_lr"]:g}, betas 0.9 and 0.95, no weight decay) on the rest; gradient norm at most
  {recipe["clip"]:g}.
- Rate: {recipe["warmup"]} steps of warm-up, constant, linear to zero over the last {recipe["cooldown"]:.0%}.
- Seed {recipe["seed"]}; float32; {machine["processor"]} processor, {machine["threads"]} thread(s); torch
  {machine["torch"]}.

![Loss curve]({CURVE_NAME})"""


def write_card(folder: Path | str) -> Path:
    """Write `README.md` and the loss curve into a model folder; returns the path of the card.

    Raises `ValueError` naming the file that is missing and the command that writes it.
    """
    folder = Path(folder)
    by_training = "it is written by python -m hooked_recurrent.zoo.train"
    record = read_json(folder, RECORD_NAME, by_training)
    log = read_log(folder)
    hint = f"write it by python -m hooked_recurrent.zoo.evaluate FOLDER --json FOLDER/{EVALUATION_NAME}"
    evaluation = read_json(folder, EVALUATION_NAME, hint)
    model_type = read_json(folder, "config.json", by_training)["model_type"]
    config, name = record["recipe"]["config"], record["recipe_name"]
    mixer, rules = config["mixer"], ", ".join(dict.fromkeys(config["layer_types"]))
    mlp = "no MLPs" if config["d_mlp"] is None else f"MLP width {config['d_mlp']}"
    draw_loss_curve(log, folder / CURVE_NAME)
    card = f"""---
language: code
license: mit
library_name: {LIBRARIES.get(model_type, "transformers")}
pipeline_tag: text-generation
---

# {name}

A language model of {parameter_count(folder) / 1e6:.2f} million parameters that reads Python source: small enough to
study whole. {len(config["layer_types"])} layers ({rules}), width {config["d_model"]},
{mixer["n_heads"]} heads per layer, each with a memory of {mixer["d_k"]} x {mixer["d_v"]}; {mlp};
vocabulary {config["d_vocab"]:,}.

```python
from hooked_recurrent import HookedRecurrentModel

model = HookedRecurrentModel.from_pretrained("{name}")
logits, cache = model.run_with_cache("def area(self):\\n    return self.")
```

{weights_sentence(model_type)}

{score_section(evaluation)}

## How long each head remembers

Half-life of a head's memory in tokens, log(1/2) / log_decay, over all held-out tokens (and key channels, where
each has a decay of its own).
{half_life_summary(evaluation["half_lives"])}

{half_life_table(evaluation["half_lives"])}

{training_section(record, log)}

Made by `python -m hooked_recurrent.zoo.train --recipe {name} --steps {record["recipe"]["steps"]} --out FOLDER`.

## Use and limits

Made for studying writes to a recurrent memory: it is real enough to have structure worth finding, and not made for
writing code that anyone should run. It has read one kind of text, in windows of {record["recipe"]["seq_len"]:,} tokens;
on other languages expect little. It may repeat passages of its training text.

The text is the Python standard library, copyright Python Software Foundation and its contributors, under the PSF
License Agreement; the text itself is not part of this folder. The weights are under this package's licence.
"""
    write_text(folder / "README.md", card)
    return folder / "README.md"


def main(
    folder: Annotated[Path, typer.Argument(help="A folder written by the training command, with evaluation.json.")],
) -> None:
    """Write the model card of a trained model: README.md and its loss curve."""
    print(write_card(folder))


if __name__ == "__main__":
    run_command(main)
