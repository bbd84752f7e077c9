"""--config: options from a file, below those of the command line."""

import json

import pytest
from typer.testing import CliRunner

from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app
from writesae.cli.config_file import as_defaults

RUNNER = CliRunner()
CONTENTS = {
    "run.yaml": "sae: sae\ncount: 3\nper-atom: 7\natom: [1, 2]\nform: net\njson: true\ndry_run: true\n",
    "run.json": json.dumps(
        {"sae": "sae", "count": 3, "per_atom": 7, "atom": [1, 2], "form": "net", "json": True, "dry-run": True}
    ),
    "run.toml": 'sae = "sae"\ncount = 3\nper-atom = 7\natom = [1, 2]\nform = "net"\njson = true\ndry_run = true\n',
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    sae = WriteSAE(WriteSAEConfig(32, 32, n_atoms=8, k=2))
    sae.provenance.update(model="owner/on-the-hub", layer=2, head=1)
    sae.save(tmp_path / "sae")
    for name, content in CONTENTS.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_gives_what_the_line_leaves_open(name):
    told = json.loads(RUNNER.invoke(app, ["erase", "--config", name]).stdout)
    config = told["config"]
    assert (config["count"], config["per_atom"], config["atoms"], config["form"]) == (3, 7, [1, 2], "net")
    above = ["--per-atom", "9", "--atom", "5", "--form", "additive"]
    config = json.loads(RUNNER.invoke(app, ["erase", "--config", name, *above]).stdout)["config"]
    assert (config["count"], config["per_atom"], config["atoms"], config["form"]) == (3, 9, [5], "additive")


class Option:
    def __init__(self, name, multiple=False, is_flag=False):
        self.name, self.multiple, self.is_flag = name, multiple, is_flag


OPTIONS = {
    "per_atom": Option("per_atom"),
    "atom": Option("atom", multiple=True),
    "json": Option("as_json", is_flag=True),
}


def test_values_become_words_of_the_line():
    assert as_defaults({"per-atom": 3, "atom": 4, "json": True}, OPTIONS) == {
        "per_atom": "3",
        "atom": ["4"],
        "as_json": True,
    }
    assert as_defaults({"per-atom": None}, OPTIONS) == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"per_atm": 3}, "no option 'per_atm'; did you mean 'per-atom'"),
        ({"xyz": 3}, "the options are atom, json, per-atom"),
        ({"per_atom": [3]}, "'per_atom' takes one value, got the list"),
        ({"atom": {"a": 1}}, "'atom' takes one value, got the dict"),
        ({"json": "yes"}, "'json' is true or false, got 'yes'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        as_defaults(values, OPTIONS)
