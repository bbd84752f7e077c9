"""RWKV's World tokenizer (65,536 rows, greedy longest match over bytes), from the packages of the extra `rwkv`.

Official checkpoints come without a tokenizer: a vocabulary of 65,536 means this one. The vocabulary file is that of the
`rwkv` package, or of the model's folder where it has one; the class that reads it is always the installed rwkv7_hf's, which
has transformers' calls and evaluates literals only. What a folder's `auto_map` names is never run. The tokenizer has no
BOS token, and an end of text (`<|endoftext|>`) of id 0.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

VOCABULARY_FILE = "rwkv_vocab_v20230424.txt"
D_VOCAB = 65536
CLASSES = ("RWKV7Tokenizer", "RwkvTokenizer")
"""How the tokenizer_config.json of a folder calls it: rwkv7_hf's name, and that of fla's converted models."""
MISSING = (
    "RWKV's World tokenizer needs the packages rwkv and rwkv7-hf: pip install 'hooked-recurrent[rwkv]'; or pass tokens"
)


def is_world(folder: Path) -> bool:
    """Whether the tokenizer files of a folder are those of the World tokenizer in its own, not in transformers', format."""
    if (folder / "tokenizer.json").is_file():
        return False
    if (folder / VOCABULARY_FILE).is_file():
        return True
    try:
        return json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] in CLASSES
    except (OSError, ValueError, KeyError, TypeError):
        return False


def attach(model: Any, folder: Path | None) -> None:
    """Give a model without tokenizer the World tokenizer, if its folder has the vocabulary or its size tells so.

    Where the packages are missing the model stays without one, and says what to install when it is given text.
    """
    own = None if folder is None else folder / VOCABULARY_FILE
    file = own if own is not None and own.is_file() else None
    if file is None and model.cfg.d_vocab != D_VOCAB:
        return
    try:
        model.tokenizer = world_tokenizer(file)
    except ImportError:
        model.without_tokenizer = MISSING


def world_tokenizer(vocabulary: Path | None = None) -> Any:
    """The World tokenizer over a vocabulary file, by default that of the `rwkv` package.

    Raises `ImportError` without the packages, and `ValueError` for a file that is no such vocabulary.
    """
    from rwkv7_hf.tokenization_rwkv7 import RWKV7Tokenizer

    if vocabulary is None:
        found = importlib.util.find_spec("rwkv")  # not imported: that prints, and changes settings of torch
        if found is None or found.origin is None:
            raise ImportError("no package rwkv")
        vocabulary = Path(found.origin).with_name(VOCABULARY_FILE)
    try:
        return RWKV7Tokenizer(str(vocabulary))
    except (ValueError, TypeError, SyntaxError) as error:  # of a line's numbers, or of the literal between them
        raise ValueError(f"{vocabulary} is no vocabulary of RWKV's World tokenizer: {error}") from None
