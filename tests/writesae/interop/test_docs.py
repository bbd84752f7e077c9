"""Every code block of the pages on formats runs, from top to bottom, in one namespace and an empty folder."""

import re
import shlex
import warnings
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from tests.writesae.interop.test_hub import Hub
from writesae.cli import app
from writesae.sae.storage import ORIGIN

DOCS = Path(__file__).parents[3] / "docs"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["formats.md", pytest.param("saelens.md", marks=pytest.mark.sae_lens)])
def test_the_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "repo_info", "create_branch", "upload_folder", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    names: dict = {}
    for language, block in blocks:
        if language == "sh":
            program, *words = shlex.split(block)
            assert program == "writesae" and CliRunner().invoke(app, words).exit_code == 0
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, page, "exec"), names)  # our own text, not input


def test_the_page_names_everything_that_a_provenance_answers():
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in ORIGIN)
