"""Text to passages of tokens, with the split by FILE on record.

A passage is cut from one file and starts with the tokenizer's start token, so the model meets it as it met its training
text, and what is held out stays whole: no file has passages on both sides of the split, because the split is decided
by the file's name (`hooked_recurrent.zoo.corpus`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent.display import OneLine
from hooked_recurrent.zoo.corpus import SPLITS, SourceFile, fingerprint, split_of

_CANDIDATES = 4  # passages cut for each that is kept, so that the kept ones come from many files


@dataclass(frozen=True, repr=False)
class Passages(OneLine):
    """Token passages and where each comes from."""

    tokens: Int[Tensor, "passage length"]
    """Start token, then length - 1 tokens of one file."""
    files: tuple[str, ...]
    """Per passage, the name of its file."""
    offsets: tuple[int, ...]
    """Per passage, the place in its file's tokens of the first token after the start token."""
    split: str
    """Which side of the split the files are on, as the caller said."""
    fingerprint: str
    """Hash of the names and contents of all files given."""
    n_files: int
    """Files that were read."""
    too_short: int
    """How many of these had not a single full passage."""
    seed: int
    """Seed of the choice and order of the passages."""

    def __len__(self) -> int:
        return len(self.tokens)

    def record(self) -> dict[str, Any]:
        """What a checkpoint has to remember of this text, as plain JSON values."""
        return {
            "split": self.split,
            "fingerprint": self.fingerprint,
            "n_files": self.n_files,
            "too_short": self.too_short,
            "n_passages": len(self.tokens),
            "length": int(self.tokens.shape[1]),
            "seed": self.seed,
        }


def text_folder(folder: str | Path, split: str, pattern: str = "*.txt") -> list[SourceFile]:
    """The text files in or below a folder that are on one side of the split, in name order.

    About one file in ten is "heldout", by the same hash of its name as in `hooked_recurrent.zoo.corpus`, so a file keeps its
    side whatever else lies beside it.

    Raises:
        ValueError: no such folder, no file of that pattern, none on that side, or one that is not UTF-8.
    """
    if split not in SPLITS:
        near = get_close_matches(str(split), SPLITS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'heldout'{hint}")
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"no files {pattern!r} in {str(folder)!r}{'' if folder.is_dir() else ', which is no folder'}")
    files = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if split_of(name) == split:
            try:
                files.append(SourceFile(name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError as error:
                raise ValueError(f"{str(path)!r} is not UTF-8 text: {error}") from None
    if not files:
        raise ValueError(
            f"none of the {len(paths)} files {pattern!r} in {str(folder)!r} is on the {split} side of the split"
        )
    return files


def start_token(tokenizer: Any) -> int:
    """The token that begins every text: BOS, or where there is none, EOS. Raises `ValueError` when there is neither."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError("this tokenizer has neither a BOS nor an EOS token, so no passage can be given a start")


def passages(
    files: Sequence[SourceFile],
    tokenizer: Any,
    length: int,
    *,
    split: str,
    max_passages: int | None = None,
    seed: int = 0,
) -> Passages:
    """Cut files into passages of `length` tokens, in random order.

    Args:
        files: the files of one split, such as `standard_library(split="train")`.
        tokenizer: a transformers tokenizer, or a model that has one.
        length: tokens per passage, the start token included.
        split: the name of the split, kept on record.
        max_passages: keep this many, chosen at random; files are read in random order until there are four times as
            many to choose from. None reads all files and keeps all passages.
        seed: of choice and order.

    Raises:
        ValueError: no tokenizer, length below 2, max_passages below 1, or no file with a full passage.
    """
    if isinstance(files, str | Path) or not all(isinstance(file, SourceFile) for file in files):
        raise TypeError("files must be SourceFiles, such as standard_library('train') or text_folder(folder, 'train')")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so text cannot be cut into passages; give a tokenizer")
    if length < 2:
        raise ValueError(f"length must be at least 2 (the start token and one more), got {length}")
    if max_passages is not None and max_passages < 1:
        raise ValueError(f"max_passages must be at least 1, got {max_passages}")
    start, body = start_token(tokenizer), length - 1
    generator = torch.Generator().manual_seed(seed)
    enough = math.inf if max_passages is None else _CANDIDATES * max_passages
    rows: list[Tensor] = []
    names: list[str] = []
    offsets: list[int] = []
    n_read = too_short = 0
    for number in torch.randperm(len(files), generator=generator).tolist():
        if len(names) >= enough:
            break
        file = files[number]
        ids = tokenizer.encode(file.text, add_special_tokens=False)
        n_full = len(ids) // body
        n_read += 1
        too_short += n_full == 0
        if n_full:
            rows.append(torch.tensor(ids[: n_full * body]).view(n_full, body))
            names += [file.name] * n_full
            offsets += range(0, n_full * body, body)
    if not rows:
        raise ValueError(f"none of the {len(files)} files has {body} tokens, so there is no passage of length {length}")
    chosen = torch.randperm(len(names), generator=generator)[:max_passages]
    tokens = torch.nn.functional.pad(torch.cat(rows)[chosen], (1, 0), value=start)
    picked = chosen.tolist()
    return Passages(
        tokens=tokens,
        files=tuple(names[i] for i in picked),
        offsets=tuple(offsets[i] for i in picked),
        split=split,
        fingerprint=fingerprint(list(files)),
        n_files=n_read,
        too_short=too_short,
        seed=seed,
    )
