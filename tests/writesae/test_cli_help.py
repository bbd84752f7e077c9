"""Help that teaches: panels in order, a sentence for every option, for every command an example that runs; completion."""

import shlex
from functools import cache

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import hooked_recurrent
from hooked_recurrent import HookedRecurrentModel
from writesae import WriteSAE, WriteSAEConfig
from writesae.cli import app, completion
from writesae.cli.base import ORDER, PANELS
from writesae.config import PRESETS

RUNNER = CliRunner()
OTHERS = {"report", "view"}  # of their own tests


def commands():
    """Every command by its words."""
    found = {}
    for name, command in get_command(app).commands.items():
        parts = getattr(command, "commands", None)
        found |= {f"{name} {part}": one for part, one in parts.items()} if parts else {name: command}
    return {name: command for name, command in found.items() if name not in OTHERS}


COMMANDS = commands()


def test_the_panels_stand_in_the_order_of_a_new_user():
    shown = RUNNER.invoke(app, ["--help"], env={"COLUMNS": "100"}).stdout
    there = [panel for panel, names in PANELS.items() if {*names} & {*get_command(app).commands}]
    places = [shown.index(f"─ {panel} ─") for panel in there]
    assert places == sorted(places) and len(places) >= 7
    verbs = [shown.index(f"│ {verb} ") for verb in ("demo", "models", "train", "cache", "replace", "logits", "convert")]
    assert verbs == sorted(verbs)
    assert "Exit codes" in shown and "130" in shown


def test_every_command_has_its_panel():
    assert {name.split()[0] for name in COMMANDS} <= {*ORDER}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_said_in_a_sentence(name):
    for parameter in COMMANDS[name].params:
        words = getattr(parameter, "help", None) or ""
        assert len(words) > 10 and words[0] in words[0].upper() + "'-" and words.rstrip()[-1] in ".)", (
            parameter.name,
            words,
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_a_file(name):
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert {"--json", "--config"} <= options


def test_what_computes_long_can_be_asked_first():
    quick = {"models", "convert", "cache list"}
    for name, command in COMMANDS.items():
        assert any("--dry-run" in parameter.opts for parameter in command.params) == (name not in quick)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where what the examples name is there."""
    folder = tmp_path_factory.mktemp("place")
    for path, layer, head in (("runs/l2h1/sae", 2, 1), ("runs/l2h1-seed1/sae", 2, 1), ("runs/l2h3/sae", 2, 3)):
        sae = WriteSAE(WriteSAEConfig(32, 32, n_atoms=8, k=2))
        sae.provenance.update(model="tiny-gated-deltanet", layer=layer, head=head, training={"steps": 5})
        sae.save(folder / path)
    (folder / "caches").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedRecurrentModel, "from_pretrained", cache(HookedRecurrentModel.from_pretrained))
        patch.setattr(
            "writesae.cli.dry_run.Forecast.measure", lambda *_: None
        )  # not timed here: see test_cli_dry_run.py
        yield folder


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_runs(name, place, monkeypatch):
    monkeypatch.chdir(place)
    examples = [line for line in COMMANDS[name].help.splitlines() if line.strip().startswith("Example: writesae ")]
    assert len(examples) == 1
    words = shlex.split(examples[0].split("writesae", 1)[1])
    assert " ".join(words).startswith(name)
    if name == "convert":  # there is no file of the paper's code: as far as saying that
        result = RUNNER.invoke(app, words)
        assert result.exit_code == 2 and "no weights file at L9_H4/best.pt" in result.stderr
        return
    dry = [] if name in ("models", "cache list") else ["--dry-run"]
    result = RUNNER.invoke(app, [*words, *dry])
    assert result.exit_code == 0, result.output


def test_the_version_is_that_of_the_package():
    assert RUNNER.invoke(app, ["--version"]).stdout.split() == ["writesae", hooked_recurrent.__version__]


def test_models_and_hooks_complete():
    assert completion.complete_model("tiny-r") == ["tiny-rwkv7"]
    assert completion.complete_preset("bilinear_t") == ["bilinear_tied"]
    assert {*completion.PRESETS} == {*PRESETS}


@pytest.mark.parametrize("name", ["tiny-gated-deltanet", "tiny-mamba2", "tiny-rwkv7"])
def test_every_hook_that_completes_is_there(name):
    class Line:
        params = {"model": name}

    model = HookedRecurrentModel.from_pretrained(name)
    found = completion.complete_hook(Line, "blocks.")
    assert len(found) == model.cfg.n_layers * (len(completion.LEARNED) + 1)
    assert {*found} <= {*model.hook_dict}
    Line.params = {"model": "owner/name"}
    assert completion.complete_hook(Line, "blocks.") == []


def test_the_shell_is_answered():
    line = {"_WRITESAE_COMPLETE": "complete_bash", "COMP_WORDS": "writesae train --model tiny-m", "COMP_CWORD": "3"}
    result = RUNNER.invoke(app, [], prog_name="writesae", env=line)
    assert result.stdout.split() == ["tiny-mamba2"]
