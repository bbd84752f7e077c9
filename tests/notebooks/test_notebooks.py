"""Every notebook runs from top to bottom, and the committed file is what such a run leaves: whole, small, with pictures.

What a notebook must be is a list of small rules from a notebook to its complaints, so that each can be shown to fail.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hooked_recurrent import AttentionConfig, GatedDeltaNetConfig, HookedRecurrentModel, ModelConfig
from notebooks import run

NOTEBOOKS = run.found()
MODEL = "tiny-gated-deltanet"
MOST_BYTES = 600_000
# Three folders deep is a path of somebody's machine; a URL's slashes follow a colon, a slash or a host.
MACHINE_PATH = re.compile(r"(?<![\w/:.<)])/(?:[\w.-]+/){2,}[\w.-]*|\b[A-Z]:\\\\?[Uu]sers")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def shown(output: NotebookNode) -> dict[str, str]:
    """The kinds and texts of what one output shows."""
    if output.output_type == "stream":
        return {output.name: output.text}
    if output.output_type == "error":
        return {"error": "\n".join(output.traceback)}
    return {kind: value if isinstance(value, str) else str(value) for kind, value in output.data.items()}


def is_picture(output: NotebookNode) -> bool:
    """A PNG, or HTML that draws: a page of plain text in tags is no picture."""
    data = output.get("data", {})
    return "image/png" in data or any(
        mark in data.get("text/html", "") for mark in ("<svg", "<img", "<canvas", "style=")
    )


def unfinished(notebook: NotebookNode) -> Iterator[str]:
    """Cells that were skipped, run out of order, or failed."""
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    for place, cell in enumerate(cells, 1):
        if cell.execution_count != place:
            yield f"code cell {place} has the execution count {cell.execution_count}"
        if cell.metadata.get("tags"):
            yield f"code cell {place} has the tags {cell.metadata.tags}"
    if len(cells) != len(code_cells(notebook)):
        yield "a code cell is empty"
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error was committed: {output.ename}"
        if output.get("name") == "stderr":
            yield f"something was said on stderr: {output.text[:80]}"


def badly_told(notebook: NotebookNode) -> Iterator[str]:
    """No opening that says what will be seen, no picture, or no end with something to try."""
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "it does not begin with a title"
    elif "you will see" not in first.source.lower() or "\n- " not in first.source:
        yield "the first cell does not say what you will see, with a list"
    headings = [
        line
        for c in notebook.cells
        if c.cell_type == "markdown"
        for line in c.source.splitlines()
        if line.startswith("## ")
    ]
    if not headings or not headings[-1].startswith("## Try"):
        yield "it does not end with a section 'Try'"
    if not any(is_picture(output) for output in outputs(notebook)):
        yield "its outputs hold no picture"


def tied_to_a_model(notebook: NotebookNode) -> Iterator[str]:
    """The model named anywhere but in the one line that a reader edits."""
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    naming = [line for line in lines if MODEL in line]
    if len(naming) != 1 or not naming[0].startswith(f'MODEL = "{MODEL}"'):
        yield f'the model is to be named in the one line MODEL = "{MODEL}", found {naming}'
    loads = [line for line in lines if "from_pretrained(" in line and "HookedRecurrentModel" in line]
    if len(loads) != 1 or "from_pretrained(MODEL" not in loads[0]:
        yield f"the model is to be loaded once, by from_pretrained(MODEL), found {loads}"


def from_a_machine(notebook: NotebookNode) -> Iterator[str]:
    """Paths and addresses that only the machine has on which it was run."""
    texts = [cell.source for cell in notebook.cells]
    texts += [
        text for output in outputs(notebook) for kind, text in shown(output).items() if not kind.startswith("image/")
    ]
    for text in texts:
        for word in (MACHINE_PATH.search(text), ADDRESS.search(text)):
            if word:
                yield f"it holds {word.group()!r}"


RULES = (unfinished, badly_told, tied_to_a_model, from_a_machine)


def with_pictures(notebook: NotebookNode) -> list[int]:
    """The cells that show a PNG."""
    cells = enumerate(notebook.cells)
    return [place for place, cell in cells if any("image/png" in o.get("data", {}) for o in cell.get("outputs", ()))]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook_runs_from_top_to_bottom(path):
    before = path.read_bytes()
    fresh = run.execute(path)
    assert [word for rule in RULES for word in rule(fresh)] == []
    committed = nbformat.read(path, as_version=4)
    assert with_pictures(fresh) == with_pictures(committed), "the committed outputs are not those of this code"
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_committed_file(path, tmp_path):
    committed = nbformat.read(path, as_version=4)
    assert [word for rule in RULES for word in rule(committed)] == []
    assert path.stat().st_size < MOST_BYTES
    run.save(run.settled(committed), tmp_path / "again.ipynb")
    assert (tmp_path / "again.ipynb").read_bytes() == path.read_bytes(), "not as `python -m notebooks.run` writes it"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A folder with a random model of Qwen3.5's kind: softmax layers between recurrent ones, more value than key heads."""
    mixer = GatedDeltaNetConfig(n_heads=6, n_key_heads=3, d_k=8, d_v=12)
    attention = AttentionConfig(n_heads=2, n_key_value_heads=1, d_head=16, rotary_dims=8)
    layers = ("gated_delta_net", "attention", "gated_delta_net", "gated_delta_net", "attention")
    tokenizer = HookedRecurrentModel.from_pretrained(MODEL).tokenizer
    cfg = ModelConfig(d_model=32, d_vocab=4096, d_mlp=48, layer_types=layers, mixer=mixer, attention=attention)
    return HookedRecurrentModel(cfg, tokenizer).save_pretrained(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-mamba2", "tiny-rwkv7", "hybrid"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_another_model_is_one_line(path, model, request, tmp_path):
    """What a notebook says of its outputs is of the bundled model; its code is of any."""
    name = str(request.getfixturevalue("hybrid")) if model == "hybrid" else model
    text = path.read_text(encoding="utf-8")
    assert text.count(f'MODEL = \\"{MODEL}\\"') == 1
    edited = tmp_path / path.name
    edited.write_text(text.replace(f'MODEL = \\"{MODEL}\\"', f'MODEL = \\"{name}\\"'), encoding="utf-8")
    assert [word for rule in (unfinished, badly_told) for word in rule(run.execute(edited))] == []


def test_every_notebook_has_a_line_in_the_index():
    index = (run.FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"]({path.name})" not in index] == []


def good() -> NotebookNode:
    """A notebook that keeps every rule."""
    load = f'MODEL = "{MODEL}"\nmodel = HookedRecurrentModel.from_pretrained(MODEL)'
    picture = new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x560>"})
    opening = "# A title\n\nWhat you will see:\n\n- one thing"
    code = [new_code_cell(load, execution_count=1), new_code_cell("draw()", execution_count=2, outputs=[picture])]
    return new_notebook(cells=[new_markdown_cell(opening), *code, new_markdown_cell("## Try\n\nanother layer")])


def spoilt(**changes) -> NotebookNode:
    """The good one with fields of its second code cell changed."""
    notebook = good()
    notebook.cells[2].update(changes)
    return notebook


SPOILT = {
    "not run": spoilt(execution_count=None),
    "run in another order": spoilt(execution_count=3),
    "tagged": spoilt(metadata=nbformat.from_dict({"tags": ["skip-execution"]})),
    "an error": spoilt(
        outputs=[*good().cells[2].outputs, new_output("error", ename="ValueError", evalue="", traceback=[])]
    ),
    "a warning": spoilt(outputs=[*good().cells[2].outputs, new_output("stream", name="stderr", text="beware")]),
    "no picture": spoilt(outputs=[new_output("display_data", data={"text/html": "<p>numbers</p>"})]),
    "a second model": spoilt(source=f'other = "{MODEL}"'),
    "a path": spoilt(source="open('/home/someone/notes')"),
    "an address": spoilt(outputs=[*good().cells[2].outputs, new_output("stream", text="<object at 0x7f3a5c0012b0>")]),
    "no end": new_notebook(cells=good().cells[:-1]),
    "no opening": new_notebook(cells=[new_markdown_cell("# A title"), *good().cells[1:]]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_each_rule_can_fail(what):
    assert [word for rule in RULES for word in rule(good())] == []
    assert len([word for rule in RULES for word in rule(SPOILT[what])]) == 1


def small(folder: Path, *sources: str) -> Path:
    """A notebook of plain Python, which needs no model and so no time."""
    cells = [new_code_cell(source, metadata={"tags": ["skip-execution", "raises-exception"]}) for source in sources]
    path = folder / "07_small.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"widgets": {}}), path)
    return path


def test_a_run_leaves_nothing_that_differs_from_run_to_run(tmp_path):
    path = small(
        tmp_path, "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ.get('TRITON_INTERPRET'))", "2 + 2"
    )
    fresh = run.execute(path)
    assert [cell.execution_count for cell in fresh.cells] == [1, 2], "a tag skipped a cell"
    assert shown(fresh.cells[0].outputs[0]) == {"stdout": "1 None\n"}
    assert [(cell.id, dict(cell.metadata)) for cell in fresh.cells] == [("cell-00", {}), ("cell-01", {})]
    assert set(fresh.metadata) == {"kernelspec", "language_info"}
    assert dict(fresh.metadata.language_info) == {"name": "python"}


def test_a_cell_that_raises_is_named_and_the_file_stays_as_it_was(tmp_path, monkeypatch, capsys):
    path = small(tmp_path, "1", "raise ValueError('no such head')", "2")
    before = path.read_bytes()
    monkeypatch.setattr(run, "found", lambda names: [path])
    with pytest.raises(SystemExit, match="1"):
        run.main()
    said = capsys.readouterr().err
    assert "07_small.ipynb, cell 1" in said and "no such head" in said and "\x1b" not in said
    assert path.read_bytes() == before


def test_names_choose_notebooks(tmp_path):
    for name in ("01_one", "02_two", "03_three"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in run.found(["03", "01_one.ipynb"], tmp_path)] == ["01_one", "03_three"]
    assert len(run.found([], tmp_path)) == 3
    with pytest.raises(ValueError, match="no notebook begins with '09'; there are 01_one, 02_two, 03_three"):
        run.found(["09"], tmp_path)
