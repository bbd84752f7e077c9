"""Byte-level BPE for Python source: 4,096 pieces, lossless, indentation kept in one piece.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2) starts from the 256 bytes and merges the
most frequent neighbours, never across the pieces that a regular expression cuts first. The usual expressions cut a run
of spaces from its line break; in Python source a line break and the indent that follows it are one event, so here
`"\\n        "` is one piece and, being frequent, one token, and so is `"):\\n        "`. A word takes along one
character before it (a space, a dot, an opening bracket): `.append` and `(self` are tokens.

The only special token is `<|endoftext|>`, id 0: it comes before every document.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
# In order: line breaks with the white space around them; a word with one leading character; up to three digits;
# punctuation, perhaps after a space, with the line break that ends it; leftover white space.
PIECES = r"[ \t]*\n[ \t\n]*|[^\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:[ \t]*\n[ \t\n]*)?|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Learn the merges from `texts`; the same texts in the same order give the same tokenizer.

    Raises `ValueError` when `vocab_size` leaves no room for the 256 bytes and the special token.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """Read a tokenizer saved by its `save_pretrained`; `ValueError` when the folder has none."""
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in {str(folder)!r}: expected a folder written by the training command")
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids per document, each preceded by `<|endoftext|>`."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    start = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return [[start, *encoding.ids] for encoding in encodings]
