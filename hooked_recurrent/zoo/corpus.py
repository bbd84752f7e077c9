"""The text that the small models read: the source files of the Python standard library of this interpreter.

Why this text: every machine that can run this package already has it, so a demo needs no download; it is real, written
by many hands, with prose (docstrings, comments) and code side by side; and copying, bracket and name tracking give a
recurrent memory something to do.

The split is by FILE, from a hash of the file's name relative to the library: the SHA-256 of the name, read as a number,
modulo 10; remainder 0 is "heldout", the rest "train". A file therefore keeps its side in every Python version.

Test suites (any folder `test`, `tests` or `idle_test` on the way) are stripped by many distributions. They are only
ever read for training the language model (`include_tests=True`), are never held out, and never enter a demo's text:
what is measured on held-out files does not depend on whether a distribution ships its tests.
"""

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath

from hooked_recurrent.display import OneLine

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 10
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# What is not the library's own text: installed packages, byte code, and files written by the build of one machine.
EXCLUDED_PARTS = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "_sysconfigdata*",
    "_sysconfig_vars*",
    "config-*",
)


@dataclass(frozen=True, repr=False)
class SourceFile(OneLine):
    """One file: its POSIX name relative to the library folder and its text (newlines as `\\n`)."""

    name: str
    text: str

    @property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True, repr=False)
class Corpus(OneLine):
    """Everything found under one folder: the readable files in name order, and the names that did not decode."""

    files: tuple[SourceFile, ...]
    undecodable: tuple[str, ...]


def library_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_test(name: str) -> bool:
    """Whether the file belongs to a test suite, which some distributions do not ship."""
    return not TEST_FOLDERS.isdisjoint(PurePosixPath(name).parts[:-1])


def split_of(name: str) -> str:
    """ "heldout" for about one file in ten, by a hash of its name; "train" for the rest and for every test suite."""
    if is_test(name):
        return "train"
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0 else "train"


def read_source(path: Path) -> str | None:
    """The text of one source file in its declared encoding (PEP 263, UTF-8 by default); None where it cannot decode."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode("utf-8")  # a declared encoding may yield lone surrogates, which no UTF-8 text has
    except (SyntaxError, UnicodeError):
        return None
    return text


@cache
def read_folder(folder: Path) -> Corpus:
    """Read every `.py` file under `folder`, sorted by POSIX relative name.

    Raises `ValueError` when there is none, as with a Python whose library is a zip archive.
    """
    files, undecodable = [], []
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        if any(fnmatch(part, pattern) for part in relative.parts for pattern in EXCLUDED_PARTS):
            continue
        text = read_source(path)
        if text is None:
            undecodable.append(relative.as_posix())
        elif text:
            files.append(SourceFile(relative.as_posix(), text))
    if not files:
        raise ValueError(
            f"no Python source files under {str(folder)!r}: expected the unpacked standard library; "
            "this Python may ship it as a zip archive or as byte code only"
        )
    return Corpus(tuple(sorted(files, key=lambda file: file.name)), tuple(sorted(undecodable)))


def standard_library(split: str = "train", include_tests: bool = False, folder: Path | None = None) -> list[SourceFile]:
    """The files of one split in name order.

    Args:
        split: "train" or "heldout".
        include_tests: add the test suites, which all lie in "train"; for training a language model only.
        folder: another folder of sources; the running interpreter's library when None.

    Raises:
        ValueError: unknown split, or no source files in the folder.
    """
    if split not in SPLITS:
        near = get_close_matches(str(split), SPLITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'heldout'{hint}")
    files = read_folder(folder or library_folder()).files
    return [file for file in files if split_of(file.name) == split and (include_tests or not is_test(file.name))]


def fingerprint(files: list[SourceFile]) -> str:
    """Sixteen hex digits of a SHA-256 over names and contents, in the given order: the same text, the same print."""
    digest = hashlib.sha256()
    for file in files:
        for part in (file.name.encode("utf-8"), file.text.encode("utf-8")):
            digest.update(len(part).to_bytes(8, "big"))
            digest.update(part)
    return digest.hexdigest()[:16]
