"""Running the server, and saying what it needs."""

import importlib
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn

NEEDED = ("fastapi", "uvicorn")
INSTALL = "the live page needs {}, which is not installed: pip install 'hooked-recurrent[view]'"


def require() -> None:
    """Raise `ValueError` with one sentence where a package of the extra `view` is missing."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise ValueError(INSTALL.format(name)) from None


def run(server: "uvicorn.Server", listening: socket.socket) -> None:
    """Serve until interrupted."""
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return  # how one stops it
