"""Every Python block of the README runs, from top to bottom, in one namespace; its table of models is the cards'."""

import re
from pathlib import Path

from hooked_recurrent.zoo.bundled import bundled_models
from hooked_recurrent.zoo.compare import side_by_side

README = Path(__file__).parent.parent / "README.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = PYTHON.findall(text)
    assert blocks
    assert text.index("```python") < text.index("\n" * 1 + "## "), "a first result comes before the first section"
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # our own text, not input
    assert "KL" in capsys.readouterr().out


def test_the_table_of_models_is_what_their_cards_say():
    assert side_by_side(list(bundled_models().values())) in README.read_text(encoding="utf-8")
