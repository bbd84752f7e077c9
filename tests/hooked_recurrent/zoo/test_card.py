import json
from dataclasses import replace

import pytest
import torch

from hooked_recurrent.zoo import card, compare, evaluate, train
from hooked_recurrent.zoo.corpus import SourceFile
from hooked_recurrent.zoo.recipes import Recipe

LOG = [
    {"step": 10, "loss": 6.0, "tokens": 1000, "seconds": 60.0, "lr": 0.1},
    {"step": 20, "loss": 4.0, "tokens": 2000, "seconds": 120.0, "lr": 0.2},
    {"step": 20, "heldout_loss": 4.5, "tokens": 2000, "seconds": 120.0, "lr": 0.2},
]


@pytest.fixture
def folder(small_model, small_config, few_files, tmp_path):
    small_model.save_pretrained(tmp_path)
    recipe = Recipe(replace(small_config, model_name="small"), steps=20, seq_len=25, batch=2)
    record = train.describe_run(recipe, "small", torch.zeros(4000, dtype=torch.int32), few_files)
    (tmp_path / train.RECORD_NAME).write_text(json.dumps(record))
    (tmp_path / train.LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in LOG))
    result = evaluate.evaluate(small_model, [SourceFile("a.py", "import os\n" * 20)])
    (tmp_path / card.EVALUATION_NAME).write_text(json.dumps(result.to_dict()))
    return tmp_path


def test_the_card_says_what_was_measured(folder, few_files):
    text = card.write_card(folder).read_text()
    result = json.loads((folder / card.EVALUATION_NAME).read_text())
    for key in ("bits_per_byte", "xz_bits_per_byte_each_file", "xz_bits_per_byte_joined"):
        assert f"{result[key]:.3f}" in text
    for life in result["half_lives"]:
        assert f"| {life['layer']} | {life['head']} | {life['lower_quartile']:.1f} | {life['median']:.1f} |" in text
    assert "20 steps of 2 windows of 25 tokens: 2,000 tokens, or\n  0.5 times the training text, in 2 minutes" in text
    assert f"{sum(file.n_bytes for file in few_files):,} bytes" in text and f"{len(few_files):,} files" in text
    assert str(folder) not in text


def test_the_curve_is_small_and_the_same_every_time(folder):
    card.write_card(folder)
    first = (folder / card.CURVE_NAME).read_bytes()
    card.write_card(folder)
    assert first == (folder / card.CURVE_NAME).read_bytes() and len(first) < 40_000
    assert b"<svg" in first and b"tokens read" in first


def test_thinning_averages_neighbours():
    lines = [{"tokens": number, "loss": float(number)} for number in range(1, 8)]
    assert card.thin(lines, points=4) == [(2, 1.5), (4, 3.5), (6, 5.5), (7, 7.0)]
    assert card.thin(lines, points=7) == [(number, float(number)) for number in range(1, 8)]


def test_weights_are_counted_from_the_file(folder, small_model):
    assert card.parameter_count(folder) == small_model.parameter_count()


def test_half_life_summary_counts_heads():
    rows = [{"median": median} for median in (3.0, 70.0, 16.0, 17.0)]
    assert card.half_life_summary(rows) == (
        "Median half-lives run from 3.0 to 70.0 tokens; 2 of 4 heads have one above 16."
    )


@pytest.mark.parametrize(
    ("name", "command"), [(train.RECORD_NAME, "train"), (train.LOG_NAME, "train"), (card.EVALUATION_NAME, "evaluate")]
)
def test_a_missing_file_is_named_with_its_command(folder, name, command):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name}' is missing.*hooked_recurrent.zoo.{command}"):
        card.write_card(folder)


def test_side_by_side(folder, small_model):
    """A row per fact and a column per model, the same numbers as on the card."""
    table = compare.side_by_side([folder, folder]).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table}
    assert cells[""] == ["small", "small"] and cells["---"] == ["--:", "--:"]
    result = json.loads((folder / card.EVALUATION_NAME).read_text())
    assert cells["**held-out bits per byte**"] == [f"**{result['bits_per_byte']:.3f}**"] * 2
    assert cells["rule"] == [small_model.cfg.mixer.rule] * 2
    assert cells["trained on"][0] == "0.0 M tokens" and cells["files shorter than by xz"][0].endswith("of 1")


def test_a_model_without_mlps_says_so(folder):
    record = json.loads((folder / train.RECORD_NAME).read_text())
    record["recipe"]["config"]["d_mlp"] = None
    (folder / train.RECORD_NAME).write_text(json.dumps(record))
    assert "; no MLPs;" in card.write_card(folder).read_text()
    assert "| MLP width | none |" in compare.side_by_side([folder])


def test_a_layout_that_transformers_does_not_know_names_who_does():
    assert "`rwkv7` of flash-linear-attention" in card.weights_sentence("rwkv7")
    assert "`mamba2` of transformers" in card.weights_sentence("mamba2")
