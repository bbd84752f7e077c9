"""Generation with the same hooks and edits as everywhere else, at prompt positions and at generated ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from hooked_recurrent.edits import Edit
from hooked_recurrent.state import RecurrentState
from hooked_recurrent.validation import check_edits


class GenerationMixin:
    """Gives a model `generate`."""

    @torch.no_grad()
    def generate(
        self: Any,
        input: Integer[Tensor, "batch pos"] | Integer[Tensor, "pos"] | str | list[str],
        max_new_tokens: int = 20,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        eos_token_id: int | None = None,
        state: RecurrentState | None = None,
        fwd_hooks: list[tuple[str | Callable[[str], bool], Callable]] | None = None,
        edits: Iterable[Edit] = (),
        return_type: str = "input",
        return_state: bool = False,
    ) -> Any:
        """Continue a text, greedily or by sampling.

        Args:
            input: tokens or text to start from (after `state`, if given).
            max_new_tokens: how many tokens to add at most.
            do_sample, temperature, top_k, seed: sampling, reproducible by its seed; greedy by default.
            eos_token_id: rows stop at this token and repeat it; generation ends when all have.
            fwd_hooks, edits: as in run_with_hooks; positions are absolute, so they may lie in the prompt or beyond it.
            return_type: "input" (text for text, tokens for tokens), "tokens" or "str".
            return_state: also return the state after all tokens but the last, which has not been read yet.

        Returns:
            Prompt and continuation: tokens [batch, pos + new], or text.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if return_type not in ("input", "tokens", "str"):
            raise ValueError(f"unknown return_type {return_type!r}; expected 'input', 'tokens' or 'str'")
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature}; do_sample=False is greedy")
        if top_k is not None and not 1 <= top_k <= self.cfg.d_vocab:
            raise ValueError(f"top_k must be between 1 and {self.cfg.d_vocab}, got {top_k}")
        tokens, edits = self._tokens(input), check_edits(edits)
        as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
        if as_text:
            self._need_tokenizer()
        end = (0 if state is None else state.position) + tokens.shape[1] + max_new_tokens
        for edit in edits:
            edit.check(self, end)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        fresh = tokens
        with self.hooks(fwd_hooks=fwd_hooks or []):
            for _ in range(max_new_tokens):
                logits, state = self(fresh, state=state, return_state=True, edits=edits)
                fresh = _choose(logits[:, -1], do_sample, temperature, top_k, generator)[:, None]
                if eos_token_id is not None:
                    fresh = torch.where(done[:, None], eos_token_id, fresh)
                    done |= fresh[:, 0] == eos_token_id
                tokens = torch.cat([tokens, fresh], dim=1)
                if eos_token_id is not None and done.all():
                    break
        output = tokens
        if as_text:
            # the BOS that to_tokens put in front of a text was never part of it
            added = not isinstance(input, Tensor) and self.tokenizer.bos_token_id is not None
            texts = self.to_string(tokens[:, int(added) :])
            output = texts if isinstance(input, list) or tokens.shape[0] > 1 else texts[0]
        return (output, state) if return_state else output


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Int[Tensor, "batch"]:
    """The next token of every row."""
    if not do_sample:
        return logits.argmax(-1)
    if top_k is not None:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
