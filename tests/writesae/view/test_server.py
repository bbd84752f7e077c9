"""The application asked as a browser, a stranger and a vandal would ask it."""

import base64
import hashlib
import json
import threading

import pytest
from starlette.testclient import TestClient

from tests.writesae.view.letters import TEXT, letters
from writesae.view.changes import Change
from writesae.view.outcome import continuations, distributions
from writesae.view.requests import LARGEST_BODY
from writesae.view.server import Desk, application, bind, page_policy
from writesae.view.session import firings, read, told

PORT = 8765
PAGE = "<!doctype html><script>let a = 1;</script><script type='application/json'>{}</script><title>x</title>"
HOME = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def study():
    return letters()


@pytest.fixture(scope="module")
def desk(study):
    return Desk(study)


@pytest.fixture(scope="module")
def client(study, desk):
    with TestClient(application(study, PAGE, PORT, desk), base_url=HOME, raise_server_exceptions=False) as client:
        yield client


def refused(answer, status, words):
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and words in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and "Traceback" not in answer.text
    safe(answer)


def safe(answer):
    headers = answer.headers
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY" and headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers and "server" not in headers


def test_answers_are_the_sessions_own(client, study):
    prompt = read(study, TEXT)
    atom = firings(prompt, 5)[0][0]
    asked = [{"position": 5, "op": "replace", "atom": atom}, {"position": 8, "op": "scale", "amount": -2}]
    changes = [Change(5, "replace", atom), Change(8, "scale", None, -2.0)]
    about = client.get("/api/about").json()
    assert about["n_atoms"] == 12 and about["bounds"]["tokens"] == 512
    answer = client.post("/api/read", json={"text": TEXT})
    assert answer.status_code == 200 and answer.json() == told(study, prompt)
    safe(answer)
    body = {"text": TEXT, "changes": asked, "position": 11, "top": 3, "reading": "cache"}
    found = client.post("/api/distributions", json=body)
    assert found.json() == distributions(study, prompt, changes, position=11, top=3, reading="cache")
    body = {"text": TEXT, "changes": asked, "new_tokens": 4, "sample": True, "temperature": 2, "seed": 5}
    found = client.post("/api/continuations", json=body)
    assert found.json() == continuations(study, prompt, changes, new_tokens=4, sample=True, temperature=2.0, seed=5)


def test_the_page_may_run_its_own_scripts_alone(client):
    answer = client.get("/")
    assert answer.text == PAGE and answer.headers["content-type"].startswith("text/html")
    safe(answer)
    policy = answer.headers["content-security-policy"]
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"; script-src 'sha256-{digest}'; style-src 'none'; " in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "script-src 'none'" in page_policy("<p>")
    assert client.head("/").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", "localhost:80", f"127.0.0.1.evil.example:{PORT}", ""]
)
def test_other_names_for_this_machine_are_refused(client, host):
    for path in ("/", "/api/about"):
        refused(
            client.get(path, headers={"host": host}), 421, "this server answers to 127.0.0.1:8765 and localhost:8765"
        )
    refused(client.post("/api/read", json={"text": "a"}, headers={"host": host}), 421, "alone")


def test_localhost_is_this_machine(client):
    assert client.get("/", headers={"host": f"LOCALHOST:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"origin": f"http://127.0.0.1:{PORT + 1}"},
        {"origin": f"http://localhost:{PORT}"},  # another origin than 127.0.0.1, which is the host here
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": HOME},
    ],
)
def test_other_pages_are_refused(client, headers):
    refused(client.post("/api/read", json={"text": "a"}, headers=headers), 403, "this server's own page alone")
    refused(client.get("/api/about", headers=headers), 403, "this server's own page alone")


def test_its_own_page_and_a_link_to_it_are_not(client):
    own = {"origin": HOME, "sec-fetch-site": "same-origin"}
    assert client.post("/api/read", json={"text": "a"}, headers=own).status_code == 200
    assert (
        client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    )  # the page itself, followed from afar


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/json"]
)
def test_bodies_are_json(client, kind):
    answer = client.post("/api/read", content=b'{"text": "a"}', headers={"content-type": kind})
    refused(answer, 415, "must be application/json")


def test_large_bodies_are_not_read(client):
    refused(client.post("/api/read", json={"text": "a" * LARGEST_BODY}), 413, "at most 65,536 bytes")

    def drops():
        for _ in range(LARGEST_BODY // 1000 + 2):
            yield b"a" * 1000

    answer = client.post("/api/read", content=drops(), headers={"content-type": "application/json"})
    refused(answer, 413, "at most 65,536 bytes")  # sent without a length
    headers = {"content-type": "application/json", "content-length": "1" * 5000}
    refused(client.post("/api/read", content=b"{}", headers=headers), 413, "at most")


READ, SHOW, GO = "/api/read", "/api/distributions", "/api/continuations"
BASE = {"text": TEXT}


def changed(**fields):
    return {**BASE, "changes": [{"position": 5, "op": "delete", **fields}]}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (READ, {}, "the field text is missing: give it"),
        (READ, {"text": ""}, "the prompt is empty: type some text first"),
        (READ, {"text": "a" * 4001}, "the prompt has 4,001 characters: give at most 4,000"),
        (READ, {"text": "a" * 513}, "the prompt has 513 tokens: give at most 512"),
        (READ, {"text": "ÄÖ"}, "the tokenizer makes no token of this prompt"),
        (READ, {"text": 5}, "the field text should be a valid string, got 5"),
        (READ, {"text": None}, "should be a valid string, got None"),
        (READ, {"text": "a", "model": "x"}, "there is no field 'model'"),
        (READ, [1], "is not the JSON object"),
        (READ, "text", "is not the JSON object"),
        (SHOW, {**BASE, "top": 51}, "the field top should be less than or equal to 50, got 51"),
        (SHOW, {**BASE, "top": 0}, "the field top should be greater than or equal to 1, got 0"),
        (SHOW, {**BASE, "top": 30}, "top must be between 1 and the 29 tokens there are, got 30"),
        (SHOW, {**BASE, "position": 19}, "token 19 is not in this text, whose tokens are 0 to 18"),
        (SHOW, {**BASE, "position": "3"}, "should be a valid integer, got '3'"),
        (SHOW, {**BASE, "position": True}, "should be a valid integer, got True"),
        (SHOW, {**BASE, "position": 10**30}, "the field position"),
        (SHOW, {**BASE, "reading": "other"}, "should be 'in_recurrence' or 'cache', got 'other'"),
        (SHOW, {**BASE, "changes": [{"position": 0, "op": "delete"}] * 33}, "at most 32"),
        (SHOW, changed(atom=12), "atom 12 is not in this dictionary, whose atoms are 0 to 11"),
        (SHOW, changed(atom=-1), "the field changes.0.atom should be greater than or equal to 0, got -1"),
        (SHOW, changed(op="erase"), "the field changes.0.op should be"),
        (SHOW, changed(position=512), "should be less than 512, got 512"),
        (SHOW, changed(op="scale", amount=1e7), "should be less than or equal to 1000000"),
        (SHOW, changed(op="scale", amount="2"), "should be a valid number, got '2'"),
        (SHOW, changed(op="scale"), "scale at token 5 needs an amount: give the factor to scale by"),
        (GO, {**BASE, "new_tokens": 101}, "the field new_tokens should be less than or equal to 100, got 101"),
        (GO, {**BASE, "temperature": 0}, "the field temperature should be greater than or equal to 0.05, got 0"),
        (GO, {**BASE, "seed": -1}, "the field seed should be greater than or equal to 0, got -1"),
        (GO, {**BASE, "sample": 1}, "the field sample should be a valid boolean, got 1"),
    ],
)
def test_what_may_be_asked_is_bounded(client, path, body, words):
    refused(client.post(path, json=body), 422, words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(client, number):
    headers = {"content-type": "application/json"}
    body = json.dumps(changed(op="scale", amount=7.25)).replace("7.25", number)
    refused(
        client.post(SHOW, content=body, headers=headers), 422, "the field changes.0.amount should be a finite number"
    )
    body = json.dumps({**BASE, "temperature": 7.25}).replace("7.25", number)
    refused(client.post(GO, content=body, headers=headers), 422, "the field temperature should be a finite number")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 60000, b'{"text": "a\\ud800"}', b'{"text": ' + b"9" * 60000]
)
def test_broken_bodies_are_told_in_one_sentence(client, body):
    answer = client.post(READ, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    refused(answer, answer.status_code, "")
    assert "JSON object" in answer.json()["error"] or "surrogate" in answer.json()["error"]


def test_other_addresses_and_methods(client):
    refused(client.get("/etc/passwd"), 404, "there is nothing at this address")
    refused(client.get("/docs"), 404, "nothing")
    refused(client.get("/openapi.json"), 404, "nothing")
    refused(client.get(READ), 405, "does not take this method")
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
        refused(client.request(method, "/"), 405, f"there is no {method} here: use GET or POST")


def test_one_question_at_a_time(client, desk, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    slow = Desk.prompt

    def waits(self, text):
        begun.set()
        assert go_on.wait(30)
        return slow(self, text)

    monkeypatch.setattr(Desk, "prompt", waits)
    answers = []
    first = threading.Thread(target=lambda: answers.append(client.post(READ, json=BASE)))
    first.start()
    assert begun.wait(30)
    for path in (READ, SHOW, GO):
        answer = client.post(path, json=BASE)
        refused(answer, 429, "another request is being worked on: try again in a moment")
        assert answer.headers["retry-after"] == "1"
    assert client.get("/").status_code == client.get("/api/about").status_code == 200  # which compute nothing
    go_on.set()
    first.join(30)
    assert answers[0].status_code == 200
    assert client.post(READ, json=BASE).status_code == 200
    refused(client.post(READ, json={"text": "ÄÖ"}), 422, "no token")
    assert client.post(READ, json=BASE).status_code == 200  # an error gives the turn back too


def test_what_breaks_is_not_shown(client, monkeypatch):
    def breaks(self, text):
        raise RuntimeError("a secret of this machine")

    monkeypatch.setattr(Desk, "prompt", breaks)
    answer = client.post(READ, json=BASE)
    refused(answer, 500, "something went wrong here")
    assert "secret" not in answer.text


def test_binding():
    with bind(0) as one:
        host, port = one.getsockname()
        one.listen()
        assert host == "127.0.0.1" and port > 0
        with pytest.raises(
            OSError, match=rf"port {port} of 127.0.0.1 cannot be used .*: choose another one with --port"
        ):
            bind(port)
    with pytest.raises(OSError, match="port 99999 of 127.0.0.1 cannot be used"):
        bind(99999)
