"""The archives that are published: built once, as for a release, from a copy of the tree; then looked into and run."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
import yaml

import hooked_recurrent

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hooked_recurrent", "writesae")
TOP = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")
MODELS = ("tiny-gated-deltanet", "tiny-mamba2", "tiny-rwkv7")
VERSION = hooked_recurrent.__version__


def run(*command: str, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shipped(root: Path) -> set[str]:
    """Every file of the two packages but bytecode, as paths from the root."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the wheel and the source archive. The wheel is made from the source archive, which so has what it takes."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in TOP:
        shutil.copy(ROOT / name, tree)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name)
    # A working tree has these, and none may be published.
    for rubbish in (
        "tests/test_a.py",
        "writesae/__pycache__/a.cpython-311.pyc",
        "results/a.json",
        ".venv/bin/activate",
    ):
        (tree / rubbish).parent.mkdir(parents=True, exist_ok=True)
        (tree / rubbish).write_text("")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree))
    return out


@pytest.fixture(scope="module")
def wheel(built):
    """The wheel's path; a pure one, for every system."""
    (path,) = built.glob("*.whl")
    assert path.name == f"hooked_recurrent-{VERSION}-py3-none-any.whl"
    return path


def test_twine_has_no_complaint(built):
    assert run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())).count("PASSED") == 2


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"hooked_recurrent-{VERSION}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == shipped(ROOT)
    for model in MODELS:
        folder = f"hooked_recurrent/zoo/{model}/"
        assert {folder + file for file in ("model.safetensors", "config.json", "tokenizer.json", "README.md")} <= names
    assert {"hooked_recurrent/py.typed", "writesae/py.typed", "writesae/report/templates/report.html.j2"} <= names
    assert f"{info}licenses/LICENSE" in names


def test_the_source_archive_holds_what_a_reader_looks_for(built):
    (path,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(path).getnames()}
    assert shipped(ROOT) | set(TOP) <= names
    assert not [name for name in names if name.startswith(("tests", "results", ".venv")) or "__pycache__" in name]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    text = archive.read(f"hooked_recurrent-{VERSION}.dist-info/METADATA").decode()
    told = HeaderParser().parse(io.StringIO(text))
    assert (told["Name"], told["Version"], told["License-Expression"]) == ("hooked-recurrent", VERSION, "MIT")
    assert told["Requires-Python"] == ">=3.11" and told["License-File"] == "LICENSE"
    assert told["Description-Content-Type"] == "text/markdown" and told.get_payload().startswith("# hooked_recurrent")
    assert "Typing :: Typed" in told.get_all("Classifier")
    assert told["Project-URL"] is None  # there is no public place to point to yet
    needed = {line for line in told.get_all("Requires-Dist") if "extra ==" not in line}
    assert not [line for line in needed if line.startswith(("triton", "pytest", "fastapi", "playwright", "mkdocs"))]
    entry_points = archive.read(f"hooked_recurrent-{VERSION}.dist-info/entry_points.txt").decode()
    assert "writesae = writesae.cli:app" in entry_points


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    run(sys.executable, "-m", "pip", *install)
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    code = (
        "import hooked_recurrent, sys; from writesae.cli import app\n"
        "print(hooked_recurrent.__file__)\n"
        "model = hooked_recurrent.HookedRecurrentModel.from_pretrained('tiny-rwkv7'); print(model('def f').shape)\n"
        "app(['models', '--json'])"
    )
    lines = run(sys.executable, "-c", code, cwd=empty, env=environment).splitlines()
    assert Path(lines[0]) == target / "hooked_recurrent" / "__init__.py"
    assert lines[1].startswith("torch.Size([1, ")
    assert {model["name"] for model in json.loads("\n".join(lines[2:]))} == set(MODELS)
    assert (target / "bin" / "writesae").exists() and not any(empty.iterdir())


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION and citation["cff-version"] == "1.2.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(.+?)\]", changes, flags=re.MULTILINE)[0]
    assert newest == VERSION or newest == "Unreleased" and VERSION in changes
