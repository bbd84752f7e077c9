"""Every Python block and every `writesae` command of the pages runs, from top to bottom of its page, in an empty folder.

```python and ```sh blocks are run here, or in the tests named in ELSEWHERE; ```bash blocks are shown only (a cluster, a GPU, an
hour) and hold no Python. A page has one namespace.
"""

import re
import shlex
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_recurrent.mixers.registry import MIXERS
from writesae.cli import app

DOCS = Path(__file__).resolve().parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    "training.md": "tests/writesae/training/test_docs.py",
    "formats.md": "tests/writesae/interop/test_docs.py",
    "saelens.md": "tests/writesae/interop/test_docs.py",
}
RUN, SHOWN = ("python", "sh"), ("bash", "yaml", "json", "text")


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def pages() -> list[str]:
    """The pages that have something to run."""
    found = sorted(DOCS.rglob("*.md"))
    return [path.relative_to(DOCS).as_posix() for path in found if any(kind in RUN for kind, _ in blocks(path))]


@pytest.mark.parametrize("page", [page for page in pages() if page not in ELSEWHERE])
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registered = dict(MIXERS)  # a page registers a rule of its own
    names: dict = {"__name__": "page"}
    try:
        for language, block in blocks(DOCS / page):
            if language == "sh":
                commands(block)
            elif language == "python":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(compile(block, page, "exec"), names)  # our own text, not input
    finally:
        MIXERS.clear()
        MIXERS.update(registered)


def commands(block: str) -> None:
    for line in block.strip().splitlines():
        program, *words = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, words)
        assert program == "writesae" and result.exit_code == 0, f"{line}\n{result.output}"


def test_nothing_that_could_run_hides_under_another_name():
    for path in DOCS.rglob("*.md"):
        for language, block in blocks(path):
            assert language in (*RUN, *SHOWN), f"{path.name}: {language}"
            assert language in RUN or not re.search(r"^(from \w+ )?import ", block, re.MULTILINE), (
                f"{path.name}: Python"
            )
    root = DOCS.parent
    for page, test in ELSEWHERE.items():
        assert page in (root / test).read_text(encoding="utf-8") and page in pages()


def test_five_tasks_are_short():
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    tasks = dict(re.findall(r"^\*\*(.+?)\.\*\* .*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE))
    assert list(tasks) == ["Load and cache", "Patch", "Train", "Replace", "Steer"]
    for name, block in tasks.items():
        assert len([line for line in block.splitlines() if line.strip()]) < 10, name
