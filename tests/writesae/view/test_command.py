"""`writesae view`, up to the moment at which it would serve."""

import importlib
import json
import webbrowser

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from tests.writesae.view.pages import ATOMS, LAYER, small
from writesae.browser import write_page
from writesae.cli import app
from writesae.view import serving
from writesae.view.server import bind


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dictionary's folder, with its page beside it."""
    study, data, _ = small()
    folder = tmp_path_factory.mktemp("view") / "sae"
    study.sae.save(folder)
    write_page(folder / "atoms.html", data)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Runs the command; what it would have served is kept, and an address that was opened too."""
    kept = {}
    monkeypatch.setattr(serving, "run", lambda server, listening: kept.update(server=server))
    monkeypatch.setattr(webbrowser, "open", lambda url: kept.update(opened=url))

    def call(*words):
        kept.clear()
        result = CliRunner().invoke(app, ["view", *map(str, words)])
        return result, kept

    return call


def test_it_serves_a_page_that_was_written(run, saved):
    result, kept = run(saved, "--page", saved / "atoms.html", "--port", 0, "--prompt", "a < b", "--json", "--open")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["atoms"] == ATOMS and told["url"].startswith("http://127.0.0.1:") and kept["opened"] == told["url"]
    with TestClient(kept["server"].config.app, base_url=told["url"]) as client:
        assert "a &lt; b</textarea>" in client.get("/").text
        assert client.get("/api/about").json()["layer"] == LAYER


def test_it_measures_a_page_where_there_is_none(run, saved):
    options = ("--passages", 3, "--length", 40, "--tested-atoms", 0, "--port", 0)
    result, kept = run(saved, *options)
    assert result.exit_code == 0, result.output
    url = result.stdout.split()[0]
    assert result.stdout == f"{url}  (Ctrl+C stops it)\n" and "opened" not in kept
    with TestClient(kept["server"].config.app, base_url=url) as client:
        page = client.get("/")
        assert "return file.</textarea>" in page.text and "120 held-out tokens" in page.text
        assert len(client.post("/api/read", json={"text": "def f"}).json()["tokens"]) > 1


def test_errors_come_before_any_work(run, saved, tmp_path, monkeypatch):
    for module in ("view", "experiments"):
        monkeypatch.setattr(f"writesae.cli.{module}.load_model", lambda name: pytest.fail("it began to work"))

    def refused(words, *given):
        result, kept = run(*given)
        assert result.exit_code == 2 and not kept, result.output
        assert words in " ".join(result.stderr.split()) and "Traceback" not in result.output

    with bind(0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        refused(f"port {port} of 127.0.0.1 cannot be used", saved, "--port", port)
    refused("port 70000 of 127.0.0.1 cannot be used", saved, "--port", 70000)
    refused("none.html", saved, "--page", tmp_path / "none.html", "--port", 0)
    (tmp_path / "other.html").write_text("<p>", encoding="utf-8")
    refused(
        "is no page that `writesae report` of this version wrote", saved, "--page", tmp_path / "other.html", "--port", 0
    )
    refused("no saved WriteSAE at", tmp_path, "--port", 0)

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    refused("fastapi, which is not installed: pip install 'hooked-recurrent[view]'", saved)


def test_an_interrupt_is_how_one_stops_it():
    class Stopped:
        def run(self, sockets):
            raise KeyboardInterrupt

    with bind(0) as listening:
        assert serving.run(Stopped(), listening) is None
