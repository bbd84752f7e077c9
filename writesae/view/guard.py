"""Who may ask: the page that this server gave out, on this machine, with small JSON bodies.

The server binds to 127.0.0.1, but other pages in the same browser can still send requests there. So a request must name this
server in its Host header (a foreign name that was made to point here, DNS rebinding, does not), a POST must come from a page
of this very origin, and its body must be JSON, which no form of another page can send. Whatever is refused is told in one
sentence, {"error": ...}, and every answer carries headers that keep it out of caches, frames and other pages.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Content security policy of everything; the page's own adds what it needs to run."""


class Refused(Exception):
    """A request that is not answered, with its status and the sentence that says why."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """ASGI middleware in front of everything; see the module's docstring."""

    def __init__(self, app: App, port: int, largest_body: int):
        self.app, self.largest_body = app, largest_body
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if port == 80:  # which browsers leave out
            self.hosts |= {"127.0.0.1", "localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on with the body read."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
                return
            raise RuntimeError(f"no {scope['type']} here")
        try:
            self._check(scope)
            if scope["method"] == "POST":
                receive = _again(await self._body(receive), receive)
        except Refused as refused:
            await answer(_with_headers(send), refused.status, refused.sentence)
            return
        await self.app(scope, receive, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            raise Refused(
                421, f"this server answers to {' and '.join(sorted(self.hosts))} alone, not to {_told(hosts)}"
            )
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, f"there is no {scope['method'][:20]} here: use GET or POST")
        sites = headers.get("sec-fetch-site", [])
        origins = headers.get("origin", [])
        if scope["method"] == "POST" or scope["path"].startswith("/api/"):
            if any(site not in ("same-origin", "none") for site in sites):
                raise Refused(403, f"requests come from this server's own page alone, not from a {_told(sites)} one")
            if any(origin != f"http://{hosts[0].lower()}" for origin in origins):
                raise Refused(403, f"requests come from this server's own page alone, not from {_told(origins)}")
        if scope["method"] == "POST":
            kinds = headers.get("content-type", [])
            if [kind.partition(";")[0].strip().lower() for kind in kinds] != ["application/json"]:
                raise Refused(415, f"a request's body must be application/json, not {_told(kinds)}")
            for length in headers.get("content-length", []):
                if not length.isdecimal() or len(length) > 15 or int(length) > self.largest_body:
                    raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        """The whole body; what is longer than allowed is not kept."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the request broke off before its end")
            body += message.get("body", b"")
            if len(body) > self.largest_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return body

    def _too_large(self) -> Refused:
        return Refused(413, f"the body of the request is too large: send at most {self.largest_body:,} bytes")


async def answer(send: Send, status: int, sentence: str) -> None:
    """{"error": sentence}, with a status."""
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive that gives a body that was read already, and after it whatever comes."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _with_headers(send: Send) -> Send:
    """A send that adds the headers of every answer; a policy that is there already stays."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            more = {**HEADERS, "content-security-policy": POLICY}
            added = [(name.encode(), value.encode()) for name, value in more.items() if name.encode() not in there]
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent


def _told(values: list[str]) -> str:
    """What a header said, as far as a sentence has room for it."""
    return ", ".join(repr(value[:60]) for value in values[:3]) or "none"
