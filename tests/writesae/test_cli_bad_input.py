"""Bad input to every command, as a new user gives it: a sentence on standard error, exit code 2, nothing on standard output."""

import shutil
from functools import cache

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hooked_recurrent import HookedRecurrentModel
from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app

RUNNER = CliRunner()
STUDIES = (
    "baselines erase install logits partition passage-test perplexity population readers replace selectivity sign-test steer"
).split()
OUT = ["--out", "out"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a dictionary and everything that is wrong with others; every model is loaded once."""
    folder = tmp_path_factory.mktemp("world")
    for name, d_v, origin in (
        ("sae", 32, {"model": "tiny-gated-deltanet", "layer": 2, "head": 1, "hook": "blocks.2.mixer.hook_write"}),
        ("nobody", 32, {}),
        ("wide", 64, {"model": "tiny-gated-deltanet", "layer": 2, "head": 1}),
        ("far", 32, {"model": "tiny-gated-deltanet", "layer": 9, "head": 1}),
        ("lost", 32, {"model": "./no-model", "layer": 2, "head": 1}),
    ):
        sae = WriteSAE(WriteSAEConfig(32, d_v, n_atoms=12, k=3))
        sae.provenance.update(origin)
        sae.save(folder / name)
    shutil.copytree(folder / "sae", folder / "half")
    weights = folder / "half" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    shutil.copytree(folder / "sae", folder / "nan")
    tensors = load_file(folder / "sae" / "sae.safetensors")
    tensors["decoder.key_atoms"][0] = float("nan")
    with safe_open(folder / "sae" / "sae.safetensors", "pt") as file:
        save_file(tensors, folder / "nan" / "sae.safetensors", metadata=file.metadata())
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "junk.pt").write_bytes(b"nonsense")
    (folder / "run.yaml").write_text("training: {step: 3}\n")
    (folder / "erase.yaml").write_text("per_atm: 3\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "half.json").write_text("{")
    (folder / "half.toml").write_text("a = \n")
    (folder / "types.yaml").write_text("count: 2.5\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedRecurrentModel, "from_pretrained", cache(HookedRecurrentModel.from_pretrained))
        yield folder


ROWS = [
    # what every experiment on a dictionary has
    *((verb, ["--sae", "nothing"], ["no saved WriteSAE at 'nothing'"]) for verb in STUDIES),
    *((verb, ["--sae", "empty"], ["no saved WriteSAE at 'empty'", "config.json"]) for verb in STUDIES),
    ("erase", ["--sae", "file"], ["no saved WriteSAE at 'file'"]),
    ("erase", ["--sae", "half"], ["half/sae.safetensors", "damaged or truncated"]),
    ("erase", ["--sae", "nan"], ["nan/sae.safetensors", "NaN"]),
    ("erase", ["--sae", "nobody"], ["does not say which model", "give --model"]),
    ("erase", ["--sae", "nobody", "--model", "tiny-rwkv7"], ["does not say which layer", "provenance['layer']"]),
    ("erase", ["--sae", "wide"], ["atoms are 32 x 64", "writes are 32 x 32"]),
    ("erase", ["--sae", "sae", "--model", "tiny-mamba2"], ["atoms are 32 x 32", "writes are 32 x 64"]),
    ("erase", ["--sae", "far"], ["layer 9 has no writes", "(0, 1, 2, 3)"]),
    ("erase", ["--sae", "lost"], ["'./no-model' is neither a folder"]),
    ("erase", ["--sae", "sae", "--model", "tiny-rwkv"], ["'tiny-rwkv'", "did you mean 'tiny-rwkv7'"]),
    ("erase", ["--sae", "sae", "--passages", "0"], ["--passages must be at least 1", "got 0"]),
    ("erase", ["--sae", "sae", "--length", "1"], ["--length at least 2", "1"]),
    ("erase", ["--sae", "sae", "--text", "nowhere"], ["no files '*.txt' in 'nowhere'", "no folder"]),
    ("erase", ["--sae", "sae", "--text", "empty"], ["no files '*.txt' in 'empty'"]),
    ("erase", ["--sae", "sae", "--out", "empty"], ["--out empty is a folder", "empty/result.json"]),
    ("erase", ["--sae", "sae", "--out", "file/x.json"], ["--out file/x.json cannot be written", "is a file"]),
    ("erase", ["--sae", "sae", "--figure", "x.docx"], ["--figure x.docx must end in", ".png"]),
    ("erase", ["--sae", "sae", "--figure", "file/x.png"], ["--figure file/x.png cannot be written"]),
    ("erase", ["--sae", "sae", "--config", "none.yaml"], ["none.yaml cannot be read"]),
    ("erase", ["--sae", "sae", "--config", "erase.yaml"], ["no option 'per_atm'", "did you mean 'per-atom'"]),
    ("erase", ["--sae", "sae", "--config", "list.yaml"], ["list.yaml must hold a mapping", "got list"]),
    ("erase", ["--sae", "sae", "--config", "half.json"], ["half.json cannot be read"]),
    ("erase", ["--sae", "sae", "--config", "half.toml"], ["half.toml cannot be read"]),
    ("erase", ["--sae", "sae", "--config", "types.yaml"], ["--count", "valid integer"]),
    ("erase", ["--sae", "sae", "--countt", "3"], ["No such option: --countt", "--count"]),
    ("erase", ["--sae", "sae", "--count", "many"], ["--count", "valid integer"]),
    ("erase", [], ["Missing option", "--sae"]),
    ("eraze", [], ["No such command 'eraze'", "erase"]),
    # the options of each
    ("erase", ["--sae", "sae", "--count", "0"], ["ErasureConfig.count", "greater than 0", "got 0"]),
    ("erase", ["--sae", "sae", "--form", "nett"], ["nett", "did you mean 'net'"]),
    ("erase", ["--sae", "sae", "--atom", "99"], ["atom 99 is outside this dictionary of 12 atoms"]),
    ("readers", ["--sae", "sae", "--per-atom", "-1"], ["per_atom", "greater than 0", "-1"]),
    ("readers", ["--sae", "sae", "--atom", "99"], ["atom 99 is outside this dictionary of 12 atoms"]),
    ("steer", ["--sae", "sae", "--dose", "-1"], ["doses", "greater than 0", "-1"]),
    ("steer", ["--sae", "sae", "--token", "99999"], ["token 99999 is out of range", "4096"]),
    (
        "steer",
        ["--sae", "sae", "--also", "sae"],
        ["sae holds a dictionary of layer 2, head 1", "another head of layer 2"],
    ),
    ("steer", ["--sae", "sae", "--also", "nothing"], ["no saved WriteSAE at 'nothing'"]),
    ("install", ["--sae", "sae", "--strata", "frequnt"], ["frequnt", "did you mean 'frequent'"]),
    ("install", ["--sae", "sae", "--magnitudes", "1,two"], ["--magnitudes takes numbers", "'two'"]),
    ("install", ["--sae", "sae", "--objective", "gredy"], ["gredy", "did you mean 'greedy'"]),
    ("install", ["--sae", "sae", "--cells", "gvien"], ["gvien", "did you mean 'given'"]),
    ("logits", ["--sae", "sae", "--cell", "21"], ["LAYER:HEAD", "'21'"]),
    ("logits", ["--sae", "sae", "--cell", "9:0"], ["no cell (9, 0)", "(0, 1, 2, 3)"]),
    ("logits", ["--sae", "sae", "--horizon", "-1"], ["horizons >= 0", "-1"]),
    ("sign-test", ["--sae", "sae", "--total", "0"], ["total", "greater than 0", "got 0"]),
    ("partition", ["--sae", "sae", "--alive", "fird"], ["fird", "did you mean 'fired'"]),
    ("partition", ["--sae", "sae", "--threshold", "2"], ["threshold", "between 0 and 1", "2.0"]),
    ("partition", ["--sae", "sae", "--other", "nothing"], ["no saved WriteSAE at 'nothing'"]),
    ("selectivity", ["--sae", "sae", "--scale", "norms"], ["norms", "did you mean 'norm'"]),
    ("selectivity", ["--sae", "sae", "--ranked", "abs"], ["abs", "'absolute'"]),
    ("perplexity", ["--sae", "sae", "--prefix", "0"], ["prefix", "greater than 0", "got 0"]),
    ("perplexity", ["--sae", "sae", "--prefix", "99"], ["99", "leaves nothing to predict", "32"]),
    ("population", ["--sae", "sae", "--pool", "list"], ["'list'", "did you mean 'listed'"]),
    ("passage-test", ["--sae", "sae", "--side", "registers"], ["registers", "did you mean 'register'"]),
    ("passage-test", ["--sae", "sae", "--atom", "99"], ["atom 99 is outside this dictionary of 12 atoms"]),
    ("baselines", ["--sae", "sae"], ["does not say how it was trained"]),
    ("baselines", ["--sae", "sae", "--train-passages", "0"], ["--train-passages must be at least 1", "got 0"]),
    ("replace", ["--sae", "sae", "--reading", "cached"], ["cached", "did you mean 'cache'"]),
    ("replace", ["--sae", "sae", "--firings", "0"], ["total", "greater than 0", "got 0"]),
    ("replace", ["--sae", "sae", "--atom", "99"], ["atom 99 is outside this dictionary of 12 atoms"]),
    ("replace", ["--sae", "sae", "--length", "20"], ["20 tokens", "at least"]),
    ("replace-cells", ["empty"], ["no dictionary lies in or below 'empty'"]),
    ("replace-cells", ["nothing"], ["no dictionary lies in or below 'nothing'"]),
    ("replace-cells", ["sae", "--keep", "file"], ["--keep file is a file", "give a folder"]),
    # the others
    ("demo", ["--layer", "1"], ["give layer and head together"]),
    ("demo", ["--layer", "9", "--head", "0", *OUT], ["layer 9 has no writes", "(0, 1, 2, 3)"]),
    ("demo", ["--steps", "0", *OUT], ["steps", "greater than 0", "got 0"]),
    ("demo", ["--out", "file"], ["--out file is a file", "give a folder"]),
    ("demo", ["--model", "./nothing", *OUT], ["'./nothing' is neither a folder"]),
    ("models", ["extra"], ["unexpected extra argument", "extra"]),
    ("convert", ["none.pt", *OUT], ["no weights file at none.pt"]),
    ("convert", ["junk.pt", *OUT], ["junk.pt was refused"]),
    ("convert", ["junk.pt", "--out", "file"], ["--out file is a file", "give a folder"]),
    ("convert", ["junk.pt", "--layout", "keyfirst", *OUT], ["keyfirst", "did you mean 'key_first'"]),
    ("train", [], ["give the run a folder: --out FOLDER"]),
    ("train", ["--out", "file"], ["--out file is a file", "give a folder"]),
    ("train", ["--cache", "file", *OUT], ["--cache file is a file", "give a folder"]),
    ("train", ["--hook", "blocks.2.mixer.hook_wirte", *OUT], ["did you mean 'blocks.2.mixer.hook_write'"]),
    ("train", ["--hook", "blocks.9.mixer.hook_write", *OUT], ["layer 9"]),
    ("train", ["--head", "4", *OUT], ["head must be 0..3, got 4"]),
    ("train", ["--head", "-1", *OUT], ["head must be 0..3, got -1"]),
    ("train", ["--preset", "bilinaer", *OUT], ["did you mean 'bilinear'"]),
    ("train", ["--k", "2000", *OUT], ["k must be at most n_atoms=1024, got 2000"]),
    ("train", ["--steps", "0", *OUT], ["steps", "greater than 0", "got 0"]),
    ("train", ["--lr", "-1", *OUT], ["lr", "greater than 0", "-1"]),
    ("train", ["--precision", "float16", *OUT], ["float16", "'float32' or 'bfloat16'"]),
    ("train", ["--log-to", "tensorbord", *OUT], ["did you mean 'tensorboard'"]),
    ("train", ["--device", "cudda", *OUT], ["--device cudda cannot be used"]),
    ("train", ["--text", "empty", *OUT], ["no files '*.txt' in 'empty'"]),
    ("train", ["--passages", "0", *OUT], ["passages", "greater than 0", "got 0"]),
    ("train", ["--config", "run.yaml", *OUT], ["TrainConfig has no field 'step'", "did you mean 'steps'"]),
    ("train", ["--config", "list.yaml", *OUT], ["list.yaml must hold a mapping"]),
    ("train", ["--resume", "--dry-run", "--model", "tiny-rwkv"], ["did you mean 'tiny-rwkv7'"]),
    ("cache", ["list", "nothing"], ["nothing is no folder"]),
    ("cache", ["write"], ["Missing option", "--out"]),
    ("cache", ["write", "--out", "file"], ["--out file is a file", "give a folder"]),
    ("cache", ["write", "--dtype", "int8", *OUT], ["--dtype must be", "float32", "int8"]),
    ("cache", ["write", "--hook", "hook_embd", *OUT], ["hook_embd", "did you mean 'hook_embed'"]),
    ("objectives", ["--objective", "wirte"], ["wirte", "did you mean 'write'"]),
    ("objectives", ["--layer", "1"], ["give layer and head together"]),
    ("objectives", ["--layer", "9", "--head", "0"], ["layer 9 has no writes", "(0, 1, 2, 3)"]),
    ("objectives", ["--seeds", "0"], ["seeds", "greater than 0", "got 0"]),
    ("encoder-swap", ["--cell", "1-1"], ["LAYER:HEAD", "'1-1'"]),
    ("encoder-swap", ["--cell", "9:0"], ["no cell (layer 9, head 0)", "(0, 1, 2, 3)"]),
    ("encoder-swap", ["--preset", "bilinaer"], ["did you mean 'bilinear'"]),
    ("encoder-swap", ["--seeds", "0"], ["seeds", "one or more"]),
    ("reproduce", ["--only", "replacment", *OUT], ["replacment", "did you mean 'replacement'"]),
    ("reproduce", ["--firings", "0", *OUT], ["firings", "greater than 0", "got 0"]),
    ("reproduce", ["--head", "1", *OUT], ["give layer and head together"]),
    ("reproduce", ["--out", "file"], ["--out file is a file", "give a folder"]),
    ("reproduce", ["--model", "tiny-rwkv", *OUT], ["did you mean 'tiny-rwkv7'"]),
    ("reproduce", ["--text", "empty", *OUT], ["no files '*.txt' in 'empty'"]),
]
SMALL = {verb: ["--passages", "2", "--length", "32"] for verb in (*STUDIES, "replace-cells")}


@pytest.mark.parametrize(
    ("verb", "words", "fragments"), ROWS, ids=[" ".join([verb, *words]) for verb, words, _ in ROWS]
)
def test_bad_input_is_one_sentence_and_exit_code_two(world, monkeypatch, verb, words, fragments):
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    small = [] if {"--passages", "--length"} & {*words} else SMALL.get(verb, [])
    result = RUNNER.invoke(app, [verb, *words, *small], terminal_width=200)
    said = " ".join(result.stderr.replace("│", " ").split())
    assert result.exit_code == 2, result.output
    assert [fragment for fragment in fragments if fragment not in said] == [], said
    assert "Traceback" not in said and len(said) < 500
    assert result.stdout == ""
    assert sorted(world.rglob("*")) == before  # nothing was begun


def test_every_command_has_a_row():
    from typer.main import get_command

    assert {verb for verb, _, _ in ROWS} >= {*get_command(app).commands} - {"report", "view"}


def test_square_brackets_in_a_message_are_no_markup(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(
        "writesae.cli.experiments.open_dictionary", raising(ValueError("must be [batch, pos], got [/x]"))
    )
    result = RUNNER.invoke(app, ["erase", "--sae", "sae"])
    assert result.exit_code == 2 and "error: must be [batch, pos], got [/x]" in result.stderr


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), KeyboardInterrupt("saved in runs/x")])
def test_an_interruption_is_exit_code_130(world, monkeypatch, stop):
    monkeypatch.chdir(world)
    monkeypatch.setattr("writesae.cli.experiments.open_dictionary", raising(stop))
    result = RUNNER.invoke(app, ["erase", "--sae", "sae", "--json"])
    assert (result.exit_code, result.stdout) == (130, "")
    assert (str(stop) or "interrupted") in result.stderr


def test_a_bug_keeps_its_traceback_where_that_is_asked_for(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("WRITESAE_TRACEBACK", "1")
    result = RUNNER.invoke(app, ["erase", "--sae", "nothing"])
    assert isinstance(result.exception, ValueError)


def test_a_reader_that_goes_away_is_no_bad_input(monkeypatch):
    monkeypatch.setattr("writesae.cli.main.print_json", raising(BrokenPipeError()))
    result = RUNNER.invoke(app, ["models", "--json"])
    assert "error" not in result.stderr and result.exit_code != 2


def raising(error):
    def fails(*_, **__):
        raise error

    return fails
