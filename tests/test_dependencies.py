"""What the packages import is what pyproject.toml says they need, no more and no less."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRA = PROJECT["optional-dependencies"]
OURS = {"hooked_recurrent", "writesae"}
# Modules whose distribution has another name; the rest are spelt alike, but for hyphens. Not read off what happens to be
# installed, because an extra's packages need not be.
SPELT = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# What a user may install besides, each extra for what it is named after; the other extras are for those who work on this.
EXTRAS = ("rwkv", "view", "plots", "logs", "sae-lens")
# In no list: it comes with the builds of torch that can use it.
FOUND = {"triton"}
# Needed, and imported nowhere: beartype checks jaxtyping's shapes for whoever turns the checks on, and einops is one of the
# packages that users of this field's notebooks find installed.
SILENT = {"beartype", "einops"}


def imports(source: str) -> Iterator[str]:
    """Top-level names of every module that is imported anywhere in a file, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0]


def distribution(module: str) -> str:
    return SPELT.get(module, module).lower().replace("_", "-")


def requirement(line: str) -> str:
    return re.match(r"[\w.-]+", line).group().lower().replace("_", "-")


@pytest.fixture(scope="module")
def imported():
    sources = (path.read_text(encoding="utf-8") for folder in OURS for path in (ROOT / folder).rglob("*.py"))
    return {name for source in sources for name in imports(source)} - OURS - sys.stdlib_module_names


def test_every_import_is_a_dependency(imported):
    listed = {requirement(line) for line in chain(PROJECT["dependencies"], *map(EXTRA.get, EXTRAS))}
    assert {name for name in imported - FOUND if distribution(name) not in listed} == set()


def test_every_dependency_is_imported(imported):
    used = {distribution(name) for name in imported} | SILENT
    assert {line for line in PROJECT["dependencies"] if requirement(line) not in used} == set()


def test_no_dependency_is_an_extra_too():
    core = {requirement(line) for line in PROJECT["dependencies"]}
    assert core & {requirement(line) for line in chain(*map(EXTRA.get, EXTRAS))} == set()


def test_the_spelling_is_that_of_the_installed():
    installed = packages_distributions()
    for module, name in SPELT.items():
        assert name in [found.lower() for found in installed[module]]


def test_imports_are_found_wherever_they_stand():
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    from i import j\nif True:\n    import k"
    assert sorted(imports(source)) == ["a", "c", "d", "i", "k"]
    assert requirement("scikit-learn>=1.5; python_version > '3'") == "scikit-learn"
