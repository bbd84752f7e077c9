"""The application: one page and three questions about it, one at a time, on 127.0.0.1 alone.

    GET  /                    the page
    GET  /api/about           model, cell, dictionary, and the bounds of a request
    POST /api/read            {"text"}: tokens, writes and firings
    POST /api/distributions   {"text", "changes", "position", "top"}: next-token distributions with and without the changes
    POST /api/continuations   {"text", "changes", "new_tokens", ...}: what the model writes next, with and without them

Answers are JSON. What is refused comes as {"error": one sentence} with a status of 4xx; while one question is being worked on,
another one is told so (429) and does not wait.
"""

import base64
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

import writesae.view.requests as asked
from writesae.view.guard import POLICY, Guard, Refused
from writesae.view.outcome import continuations, distributions
from writesae.view.session import Prompt, Session, read, tokens_of, told

HOST = "127.0.0.1"
SCRIPT, STYLE = (re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ("script", "style"))
"""What a page runs and applies; its blocks of data are `<script type=...>`, which no browser runs."""


@dataclass
class Desk:
    """Answers one question at a time, and remembers the last text that was read."""

    session: Session
    """What the questions are about."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while one is being worked on."""
    last: Prompt | None = None
    """The text read last: the next question is nearly always about the same one."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The right to compute, or `Refused` at once: a queue would grow with every impatient click."""
        if not self.lock.acquire(blocking=False):
            raise Refused(429, "another request is being worked on: try again in a moment")
        try:
            yield
        finally:
            self.lock.release()

    def prompt(self, text: str) -> Prompt:
        """A text as the model reads it; `Refused` for one with too many tokens, before the model runs."""
        if self.last is None or self.last.text != text:
            count = tokens_of(self.session.model, text).shape[1]
            if count > asked.MOST_TOKENS:
                raise Refused(422, f"the prompt has {count:,} tokens: give at most {asked.MOST_TOKENS}")
            self.last = read(self.session, text)
        return self.last

    def read(self, ask: asked.ReadAsked) -> dict[str, Any]:
        """Tokens, writes and firings of a text."""
        with self.turn():
            return told(self.session, self.prompt(ask.text))

    def distributions(self, ask: asked.DistributionsAsked) -> dict[str, Any]:
        """Next-token distributions with and without some changes."""
        with self.turn():
            changes = [change.change() for change in ask.changes]
            options: dict[str, Any] = {"position": ask.position, "top": ask.top, "reading": ask.reading}
            return distributions(self.session, self.prompt(ask.text), changes, **options)

    def continuations(self, ask: asked.ContinuationsAsked) -> dict[str, Any]:
        """What comes next with and without some changes."""
        with self.turn():
            changes = [change.change() for change in ask.changes]
            options = ask.model_dump(include={"new_tokens", "sample", "temperature", "seed", "reading"})
            return continuations(self.session, self.prompt(ask.text), changes, **options)

    def about(self) -> dict[str, Any]:
        """The session, and what a request may ask for."""
        return {**self.session.about(), "bounds": asked.BOUNDS}


def application(session: Session, page: str, port: int, desk: Desk | None = None) -> Any:
    """The ASGI application of a session: what `serve` runs and tests call.

    Args:
        session: what the page is about.
        page: its HTML; its inline scripts are the only ones that its policy lets run.
        port: where it will be served, which requests must name as their host.
        desk: who answers; made here by default.
    """
    desk = desk or Desk(session)
    app = FastAPI(title="writesae view", docs_url=None, redoc_url=None, openapi_url=None)
    headers = {"content-security-policy": page_policy(page)}

    @app.api_route("/", methods=["GET", "HEAD"])
    def index() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    app.get("/api/about")(desk.about)
    app.post("/api/read")(desk.read)
    app.post("/api/distributions")(desk.distributions)
    app.post("/api/continuations")(desk.continuations)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        more = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse({"error": error.sentence}, error.status, more)

    @app.exception_handler(RequestValidationError)
    def not_valid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": asked.sentence(error.errors()[0])}, 422)

    @app.exception_handler(ValueError)
    @app.exception_handler(IndexError)
    def not_fitting(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(HTTPException)
    def not_there(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is nothing at this address", 405: "this address does not take this method"}
        words[400] = "the body of the request is not the JSON object that was expected"
        return JSONResponse({"error": words.get(error.status_code, str(error.detail))}, error.status_code)

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> JSONResponse:
        # what went wrong is for the terminal that runs the server, where it is printed
        return JSONResponse({"error": "something went wrong here: the server's terminal says what"}, 500)

    return Guard(app, port, asked.LARGEST_BODY)


def page_policy(page: str) -> str:
    """The content security policy of a page: its own scripts and styles by their hashes, and questions to its server."""
    scripts, styles = (_hashes(found.findall(page)) for found in (SCRIPT, STYLE))
    return f"{POLICY}; script-src {scripts}; style-src {styles}; img-src data:; connect-src 'self'"


def _hashes(texts: list[str]) -> str:
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(dict.fromkeys(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)) or "'none'"


def bind(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 is any free one. `OSError` with one sentence where it is taken."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((HOST, port))
    except (OSError, OverflowError) as error:
        one.close()
        raise OSError(f"port {port} of {HOST} cannot be used ({error}): choose another one with --port") from None
    return one


def make_server(session: Session, page: str, listening: socket.socket) -> uvicorn.Server:
    """A server of a session on a bound socket; run it with `server.run(sockets=[listening])`."""
    app = application(session, page, listening.getsockname()[1])
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "ws": "none", "lifespan": "off"}
    return uvicorn.Server(uvicorn.Config(app, server_header=False, limit_concurrency=64, **options))
