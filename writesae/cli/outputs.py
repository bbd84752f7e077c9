"""Whether what a command is to write can be written: asked before hours of work, not after."""

import os
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".eps", ".webp")


def check_outputs(out: Path | None = None, figure: Path | None = None) -> None:
    """Raise `ValueError` where a file cannot be written, or a picture has an ending that says nothing of its kind."""
    for option, path in (("--out", out), ("--figure", figure)):
        if path is not None and path.is_dir():
            raise ValueError(f"{option} {path} is a folder; give a file in it, such as {path / 'result.json'}")
        if path is not None:
            _check_place(option, path)
    if figure is not None and figure.suffix.lower() not in PICTURES:
        raise ValueError(f"--figure {figure} must end in {', '.join(PICTURES)}")


def check_folder(option: str, folder: Path | None) -> None:
    """Raise `ValueError` where a folder cannot be made or written to."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file; give a folder")
    _check_place(option, folder / "file")


def _check_place(option: str, path: Path) -> None:
    """The nearest folder above that is there must be one, and let itself be written to."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{option} {path} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: no permission in {above}; give another place")
