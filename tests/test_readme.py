"""Every Python block of the README runs, from top to bottom, in one namespace."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_python_blocks_run(capsys):
    text = README.read_text(encoding="utf-8")
    blocks = PYTHON.findall(text)
    assert blocks
    assert text.index("```python") < text.index("\n" * 1 + "## "), "a first result comes before the first section"
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # our own text, not input
    assert "KL" in capsys.readouterr().out
