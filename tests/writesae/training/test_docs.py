"""Every Python block and every `writesae` command of the page on training runs, from top to bottom, in an empty folder."""

import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from writesae.cli import app
from writesae.config import TrainConfig

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
BLOCK = re.compile(r"```(python|sh|yaml)\n(.*?)```", re.DOTALL)


def test_the_blocks_run(tmp_path, monkeypatch, capsys, as_users_run):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "yaml":
            Path("run.yaml").write_text(block)
        elif language == "sh":
            for line in block.strip().splitlines():
                program, *words = shlex.split(line)
                result = CliRunner().invoke(app, words)
                assert program == "writesae" and result.exit_code == 0, f"{line}\n{result.output}"
        else:
            exec(compile(block, PAGE.name, "exec"), names)  # our own text, not input
    metrics = json.loads(Path("runs/many/metrics.json").read_text())
    assert set(metrics) == {job.name for job in names["jobs"]}
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{number}`" in text for number in names["result"].metrics["heldout"] if number != "n_writes")
    assert set(path.name for path in Path("runs/many").iterdir()) == {
        "config.json", "log.jsonl", "checkpoints", "sae", "metrics.json", "tensorboard",
    }  # fmt: skip


def test_the_page_names_fields_that_exist():
    table = PAGE.read_text(encoding="utf-8").split("## How to train")[1].split("## ")[0]
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(named) > 10 and set(named) <= set(TrainConfig().to_dict())
