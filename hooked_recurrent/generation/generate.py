"""Generation with the same hooks and edits as everywhere else, at prompt positions and at generated ones.

`generate_stream` hands out every step as it is made, and `generate` is that stream run to its end. Hooks are attached
only while a step runs: a stream that is left halfway leaves none behind, and a call of the model between two steps is its
own affair. Only the last position of the prompt is unembedded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor
from tqdm.auto import tqdm

from hooked_recurrent.edits import Edit
from hooked_recurrent.generation.sampling import Sampling
from hooked_recurrent.state import RecurrentState
from hooked_recurrent.text import TextPieces
from hooked_recurrent.validation import check_edits

RETURN_TYPES = ("input", "tokens", "str")


@dataclass
class _Run:
    """One generation, checked and ready to go: what stays the same, and how far it has come."""

    model: Any
    tokens: Tensor
    """Prompt and what was added so far, [batch, pos]."""
    state: RecurrentState | None
    """The state after all tokens but the last."""
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator | None
    stops: Tensor | None
    """Tokens that end a row."""
    fwd_hooks: list
    edits: tuple[Edit, ...]
    verbose: bool
    as_text: bool
    added_bos: int
    """How many tokens `to_tokens` put in front of a text that were never part of it."""
    as_list: bool
    """Whether text comes as a list, one per row."""

    def steps(self) -> Iterator[Tensor]:
        """The new tokens [batch, 1] of each step."""
        done = torch.zeros(self.tokens.shape[0], 1, dtype=torch.bool, device=self.tokens.device)
        fresh = self.tokens
        for _ in tqdm(range(self.max_new_tokens), disable=not self.verbose):
            fresh = self._step(fresh, done)
            self.tokens = torch.cat([self.tokens, fresh], dim=1)
            if self.stops is not None:
                done = done | torch.isin(fresh, self.stops)
            yield fresh
            if done.all():
                return

    @torch.no_grad()
    def _step(self, fresh: Tensor, done: Tensor) -> Tensor:
        """Read what is new and choose the next tokens; a row that has ended repeats the token that ended it."""
        options = {"state": self.state, "return_state": True, "edits": self.edits, "last_only": True}
        with self.model.hooks(fwd_hooks=self.fwd_hooks):
            logits, self.state = self.model(fresh, **options)
        chosen = self.sampling.choose(logits[:, -1], self.tokens, self.generator)[:, None]
        return torch.where(done, fresh[:, -1:], chosen)

    def pieces(self) -> Iterator[str | list[str]]:
        """The text of each step, and at the end what is left of characters that never became whole."""
        rows = [TextPieces(self.model.tokenizer, row) for row in self.tokens.tolist()]
        for fresh in self.steps():
            texts = [row.add(token) for row, token in zip(rows, fresh[:, 0].tolist(), strict=True)]
            yield texts if self.as_list else texts[0]
        rest = [row.rest() for row in rows]
        if any(rest):
            yield rest if self.as_list else rest[0]


class GenerationMixin:
    """Gives a model `generate` and `generate_stream`."""

    def generate(
        self: Any,
        input: Integer[Tensor, "batch pos"] | Integer[Tensor, "pos"] | str | list[str],
        max_new_tokens: int = 20,
        *,
        stop_at_eos: bool = True,
        eos_token_id: int | Iterable[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        freq_penalty: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        state: RecurrentState | None = None,
        fwd_hooks: list[tuple[str | Callable[[str], bool], Callable]] | None = None,
        edits: Iterable[Edit] = (),
        return_type: str = "input",
        return_state: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Continue a text, greedily or by sampling. The names are transformer_lens's; there, sampling is the default.

        Args:
            input: tokens or text to start from (after `state`, if given); several texts must have equally many tokens.
            max_new_tokens: how many tokens to add at most.
            stop_at_eos, eos_token_id: rows stop at this token, or any of several (by default the tokenizer's own, if there
                is one), and repeat it; generation ends when all have. stop_at_eos=False never stops.
            do_sample, temperature, top_k, top_p, freq_penalty: see `Sampling`; greedy by default.
            seed: makes samples reproducible.
            prepend_bos: as in `to_tokens`, for text.
            fwd_hooks, edits: as in run_with_hooks; positions are absolute, so they may lie in the prompt or beyond it.
            return_type: "input" (text for text, tokens for tokens), "tokens" or "str".
            return_state: also return the state after all tokens but the last, which has not been read yet.
            verbose: show a progress bar.

        Returns:
            Prompt and continuation: tokens [batch, pos + new], or text.

        Raises:
            ValueError, IndexError, TypeError: before any work is done, for options, tokens, states or edits that do not fit.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p, freq_penalty)
        stops = self._stops(stop_at_eos, eos_token_id)
        asked = (input, max_new_tokens, sampling, stops, seed, prepend_bos)
        run = self._begin(*asked, state, fwd_hooks, edits, return_type, verbose)
        for _ in run.steps():
            pass
        output = run.tokens
        if run.as_text:
            texts = self.to_string(run.tokens[:, run.added_bos :])
            output = texts if run.as_list else texts[0]
        return (output, run.state) if return_state else output

    def generate_stream(
        self: Any,
        input: Integer[Tensor, "batch pos"] | Integer[Tensor, "pos"] | str | list[str],
        max_new_tokens: int = 20,
        *,
        stop_at_eos: bool = True,
        eos_token_id: int | Iterable[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        freq_penalty: float = 0.0,
        seed: int | None = None,
        prepend_bos: bool | None = None,
        state: RecurrentState | None = None,
        fwd_hooks: list[tuple[str | Callable[[str], bool], Callable]] | None = None,
        edits: Iterable[Edit] = (),
        return_type: str = "input",
        verbose: bool = False,
    ) -> Iterator[Any]:
        """The steps of `generate`, each as it is made; takes the same arguments and refuses bad ones at once.

        Returns:
            An iterator over new tokens [batch, 1]; or, where `generate` returns text, over pieces of text (a list of one
            per row where `generate` returns a list). A character made of several tokens is held back until it is whole:
            its earlier tokens give empty pieces. The pieces of a row, joined, are what `generate` adds to the prompt.
        """
        sampling = Sampling(do_sample, temperature, top_k, top_p, freq_penalty)
        stops = self._stops(stop_at_eos, eos_token_id)
        asked = (input, max_new_tokens, sampling, stops, seed, prepend_bos)
        run = self._begin(*asked, state, fwd_hooks, edits, return_type, verbose)
        return run.pieces() if run.as_text else run.steps()

    def _stops(self: Any, stop_at_eos: bool, eos_token_id: int | Iterable[int] | None) -> Tensor | None:
        """The tokens that end a row, on the model's device; None where nothing does."""
        if eos_token_id is None:
            eos_token_id = getattr(self.tokenizer, "eos_token_id", None)
        if not stop_at_eos or eos_token_id is None:
            return None
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        for token in ids:
            if not 0 <= int(token) < self.cfg.d_vocab:
                raise ValueError(f"eos_token_id {token} is out of range: the vocabulary has {self.cfg.d_vocab} tokens")
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _begin(
        self: Any,
        input: Any,
        max_new_tokens: int,
        sampling: Sampling,
        stops: Tensor | None,
        seed: int | None,
        prepend_bos: bool | None,
        state: RecurrentState | None,
        fwd_hooks: list | None,
        edits: Iterable[Edit],
        return_type: str,
        verbose: bool,
    ) -> _Run:
        """Check what was asked for and make it ready; nothing has run and no hook is attached yet."""
        if not isinstance(max_new_tokens, int):
            raise TypeError(f"max_new_tokens must be a whole number, got {max_new_tokens!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if return_type not in RETURN_TYPES:
            raise ValueError(f"unknown return_type {return_type!r}; expected 'input', 'tokens' or 'str'")
        sampling.check(self.cfg.d_vocab)
        is_text = not isinstance(input, Tensor)
        as_text = return_type == "str" or (return_type == "input" and is_text)
        tokens, edits = self._tokens(input, prepend_bos), check_edits(edits)
        if as_text:
            self._need_tokenizer()
        end = (0 if state is None else state.position) + tokens.shape[1] + max_new_tokens
        for edit in edits:
            edit.check(self, end)
        hooks = [(self.checked_hook_name(name), function) for name, function in fwd_hooks or []]
        bos = getattr(self.tokenizer, "bos_token_id", None) if is_text else None
        return _Run(
            model=self,
            tokens=tokens,
            state=state,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=None if seed is None else torch.Generator(self.device).manual_seed(seed),
            stops=stops,
            fwd_hooks=hooks,
            edits=edits,
            verbose=verbose,
            as_text=as_text,
            added_bos=int(bos is not None and prepend_bos is not False),
            as_list=isinstance(input, list) or tokens.shape[0] > 1,
        )
