"""The house rules, kept by a test: small files and functions, docstrings, imports one way, no circles, no pickle.

The layers themselves are written in `pyproject.toml` (`[tool.importlinter]`); the other rules are read off the syntax
trees here. Each rule is a small function from one file to its complaints, so that it can be shown to fail too.
"""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hooked_recurrent", "writesae")
FILE_LINES, FUNCTION_LINES = 400, 60
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def long_parts(source: str) -> Iterator[str]:
    """The file when it is long, and every function that is; a docstring's lines teach and are not counted."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield f"{lines} lines in one file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            body = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                body -= node.body[0].end_lineno - node.body[0].lineno + 1
            if body > FUNCTION_LINES:
                yield f"{node.name} (line {node.lineno}) has {body} lines"


def undocumented(source: str) -> Iterator[str]:
    """The module, every public function and class, and every public method without a docstring.

    A method is documented where a base class of the same file says what it does, as `help` finds it there too.
    """
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if tree.body and ast.get_docstring(tree) is None:
        yield "the module has no docstring"
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        if getattr(owner, "name", "").startswith("_"):
            continue
        for node in owner.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None and not is_overload(node) and not inherits(node.name, owner, classes):
                    yield f"{node.name} (line {node.lineno}) has no docstring"


def inherits(method: str, owner: ast.AST, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether a base class among `classes`, near or far, has this method with a docstring."""
    for base in getattr(owner, "bases", []):
        parent = classes.get(ast.unparse(base))
        if parent is None:
            continue
        own = [node for node in parent.body if isinstance(node, Function) and node.name == method]
        if any(ast.get_docstring(node) is not None for node in own) or inherits(method, parent, classes):
            return True
    return False


def is_overload(node: ast.AST) -> bool:
    """Whether this is a typing overload or a property's setter, whose words stand at the main definition."""
    names = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name.endswith(("overload", ".setter")) for name in names)


def unsafe_reads(source: str) -> Iterator[str]:
    """Anything that could run code hidden in a data file: pickle in its many coats."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        for name in names:
            if name.split(".")[0] in PICKLES:
                yield f"line {node.lineno} imports {name}"
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if call == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno} calls torch.load without weights_only=True"
            if given.get("allow_pickle") == "True" or call.endswith("read_pickle"):
                yield f"line {node.lineno} unpickles through {call}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, module: str, is_package: bool, modules: Collection[str]) -> Iterator[str]:
    """What a module imports when it is imported itself; imports inside functions happen later and are not followed.

    `from package import part` needs the part when that is a module of ours, and what the package hands on otherwise.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            parts = [f"{base}.{alias.name}" for alias in node.names]
            yield from (part if part in modules else base for part in parts)


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every module that can reach itself. The graph has a hundred nodes, so plain reachability will do."""
    found = []
    for start in graph:
        seen, open_ends = set(), list(graph[start])
        while open_ends:
            name = open_ends.pop()
            if name not in seen:
                seen.add(name)
                open_ends += graph.get(name, ())
        if start in seen:
            found.append(start)
    return found


def complaints(rule, *folders: str) -> list[str]:
    files = python_files(*folders)
    return [f"{path.relative_to(ROOT)}: {word}" for path in files for word in rule(path.read_text(encoding="utf-8"))]


def test_files_and_functions_stay_small():
    assert complaints(long_parts, *PACKAGES, "tests", "benchmarks") == []


def test_everything_public_says_what_it_is():
    assert complaints(undocumented, *PACKAGES) == []


def test_no_data_file_can_run_code():
    assert complaints(unsafe_reads, *PACKAGES, "benchmarks") == []


def test_no_import_circles():
    sources = {module_name(path): path for path in python_files(*PACKAGES)}
    graph = {}
    for name, path in sources.items():
        wanted = imported_names(path.read_text(encoding="utf-8"), name, path.name == "__init__.py", sources)
        graph[name] = {other for other in wanted if other in sources and other != name}
    assert circles(graph) == []


def test_imports_point_down_the_floors(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "source", "word"),
    [
        (long_parts, "x = 1\n" * 401, "401 lines in one file"),
        (long_parts, "def f():\n" + "    x = 1\n" * 60, "f (line 1) has 61 lines"),
        (undocumented, '"""m"""\nclass A:\n    """a"""\n    def b(self): ...\n', "b (line 4)"),
        (
            undocumented,
            '"""m"""\nclass A:\n    """a"""\n    def c(self): "says"\nclass B(A):\n    """b"""\n    def d(self): ...\n',
            "d (line 7)",
        ),
        (undocumented, "def f(): ...\n", "the module"),
        (unsafe_reads, "import pickle\n", "imports pickle"),
        (unsafe_reads, "from joblib import load\n", "imports joblib"),
        (unsafe_reads, "torch.load(path)\n", "weights_only"),
        (unsafe_reads, "numpy.load(path, allow_pickle=True)\n", "numpy.load"),
    ],
)
def test_each_rule_can_fail(rule, source, word):
    assert any(word in complaint for complaint in rule(source))


def test_rules_let_good_code_pass():
    source = '"""m"""\ndef f():\n    """d' + "\n" * 60 + '"""\n    return torch.load(p, weights_only=True)\n'
    assert [*long_parts(source), *undocumented(source), *unsafe_reads(source)] == []


def test_circles_are_found_and_relative_imports_resolved():
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]
    modules = {"p", "p.m", "p.q", "p.q.r", "p.s.m"}
    assert list(imported_names("from .q import r, x", "p.m", False, modules)) == ["p.q.r", "p.q"]
    assert list(imported_names("from ..q import r", "p.s.m", False, modules)) == ["p.q.r"]
    assert list(imported_names("from . import q", "p", True, modules)) == ["p.q"]
    assert list(imported_names("import p.q\ndef f(): import p.m", "p", True, modules)) == ["p.q"]
