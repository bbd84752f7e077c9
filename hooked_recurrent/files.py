"""Files that are there whole or not at all: a temporary name beside the file, the bytes on disk, then a rename."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Ask the system to put a file's bytes on disk before going on."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: a temporary file beside it, then a rename. Its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
