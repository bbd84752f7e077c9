"""Text in, tokens out, and back: the tokenizer conveniences that transformer_lens users expect of a model."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class TextMixin:
    """Gives a model `to_tokens`, `to_string`, `to_str_tokens` and `to_single_token` over its `tokenizer`."""

    tokenizer: Any
    without_tokenizer: str = "pass tokens, or give one as from_hf(model, tokenizer=...)"
    """What to do about a missing tokenizer."""
    device: torch.device

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"this model has no tokenizer: {self.without_tokenizer}")
        return self.tokenizer

    def to_tokens(
        self,
        text: str | list[str],
        prepend_bos: bool | None = None,
        *,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids; a batch of texts must come out equally long, since a recurrent state cannot skip padding.

        prepend_bos: by default the tokenizer's BOS token is put in front if it has one.
        move_to_device: whether they go to the model's device; otherwise they stay on the CPU.
        truncate: as in transformer_lens, which cuts a text to the model's longest; a recurrent model has none, so nothing is
            cut either way.
        """
        tokenizer = self._need_tokenizer()
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
            raise TypeError(f"to_tokens takes a text or a list of texts, got {_kind(text)}")
        if not texts:
            raise ValueError("to_tokens takes one text at least, got an empty list")
        bos = tokenizer.bos_token_id
        if prepend_bos is None:
            prepend_bos = bos is not None
        if prepend_bos and bos is None:
            raise ValueError("prepend_bos=True, but this tokenizer has no BOS token")
        rows = [tokenizer.encode(one, add_special_tokens=False) for one in texts]
        rows = [[bos, *row] if prepend_bos else row for row in rows]
        if len({len(row) for row in rows}) != 1:
            lengths = [len(row) for row in rows]
            raise ValueError(
                f"texts of one batch must have equally many tokens, got {lengths}: a recurrent state would read padding as "
                "text, so run such texts one by one, or cut them to one length"
            )
        return torch.tensor(rows, dtype=torch.long, device=self.device if move_to_device else "cpu")

    def to_string(self, tokens: Int[Tensor, "*shape"] | list[int] | int) -> str | list[str]:
        """The text of one sequence, or a list of texts for a batch."""
        tokenizer, tokens = self._need_tokenizer(), self._ids(tokens)
        if tokens.ndim == 2:
            return [tokenizer.decode(row.tolist()) for row in tokens]
        return tokenizer.decode(tokens.reshape(-1).tolist())

    def to_str_tokens(self, text: str | Int[Tensor, "*batch pos"], prepend_bos: bool | None = None) -> list[str]:
        """Each token of one text, or of one row of tokens, as its own string."""
        tokens = self.to_tokens(text, prepend_bos) if isinstance(text, str) else self._ids(text)
        if tokens.ndim == 2 and tokens.shape[0] != 1:
            raise ValueError(f"to_str_tokens takes one sequence, got a batch of {tokens.shape[0]}")
        tokenizer = self._need_tokenizer()
        return [tokenizer.decode([token]) for token in tokens.reshape(-1).tolist()]

    def _ids(self, tokens: Any) -> Tensor:
        """Token ids as a tensor. Raises `TypeError` for what is none, `IndexError` for one outside the vocabulary."""
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"expected token ids, got {_kind(tokens)}") from None
        if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
            raise TypeError(f"token ids must be integers, got {ids.dtype}")
        size = getattr(getattr(self, "cfg", None), "d_vocab", None) or len(self._need_tokenizer())
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise IndexError(f"token {int(outside[0])} is out of range: the vocabulary has {size} tokens")
        return ids.long()

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token."""
        row = self._need_tokenizer().encode(text, add_special_tokens=False)
        if len(row) != 1:
            raise ValueError(f"{text!r} is {len(row)} tokens, not one")
        return row[0]


def _kind(given: Any) -> str:
    if isinstance(given, list | tuple) and given:
        return f"a list of {' and '.join(sorted({type(one).__name__ for one in given}))}"
    return type(given).__name__


BROKEN = "\ufffd"
"""What decoding puts where bytes make no character, such as the first bytes of one that is not whole yet."""


class TextPieces:
    """The text of a growing sequence of tokens, piece by piece, no character before it is whole.

    Only the tokens since the piece before the last are decoded: one by one they would lose the spaces that some tokenizers
    put between words, and all of them would take longer with every token. (The way of text-generation-inference.)
    """

    def __init__(self, tokenizer: Any, prompt: Iterable[int]):
        self.tokenizer, self.tokens = tokenizer, list(prompt)
        self.start, self.end = 0, len(self.tokens)

    def add(self, token: int) -> str:
        """What this token adds to the text; nothing while its last character is not whole."""
        self.tokens.append(token)
        if self.tokenizer.decode(self.tokens[self.start :]).endswith(BROKEN):
            return ""
        return self.rest()

    def rest(self) -> str:
        """Everything that `add` still holds back, whole or not."""
        if self.end == len(self.tokens):
            return ""
        before = self.tokenizer.decode(self.tokens[self.start : self.end])
        piece = self.tokenizer.decode(self.tokens[self.start :])[len(before.rstrip(BROKEN)) :]
        self.start, self.end = self.end, len(self.tokens)
        return piece
