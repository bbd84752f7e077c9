"""Samples of any number of sources, read off one forward pass per passage, in random order across passages.

    model, or a store on disk  ->  records of a block of passages  ->  batches {source: Samples}

Neighbouring tokens resemble each other, so a batch must mix passages. When all records fit into `cache_bytes` they are
computed once and kept; otherwise blocks of passages go through the model again in every epoch. The batches are the same
either way. `order.py` has the order: a batch is found by its number, which is all that resuming needs.

Writes and vectors come as single rows. States come by whole passages where their running sums need that, and where every
state has to be formed (decay per key channel) as random positions of a few passages; passages of the same block.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from writesae.parallel import World
from writesae.sae.samples import Samples
from writesae.sae.states import state_samples
from writesae.stream.order import Order, generator_of
from writesae.stream.sources import STATE, Described, Record, Source, collect, describe, joined, samples_of, with_terms
from writesae.stream.store import ActivationStore

Progress = Callable[[int, int], None]
Records = dict[Source, Record]
_FORMED_FROM = 8  # passages whose states are mixed in a batch where each state has to be formed
_SAMPLE = 1 << 20  # second number of the generator of samples for calibration, beyond any epoch
_WIDE = ("log_decay", "squared_norm")  # whose rounding adds up along a passage


class ActivationStream:
    """Batches {source: Samples} by number, all sources at the same tokens. See the module's docstring.

    Args:
        origin: the language model, which is run without gradients; or a store, which needs no model.
        tokens: passages, all of one length.
        sources: what to read off them.
        batch_size: samples per batch, fewer when there are not as many in all. States in whole passages: as many passages as
            hold no more than that, at least one.
        passages_per_forward: passages in one forward pass.
        skip_positions: positions left out at the start of every passage.
        cache_bytes: keep all records in memory when they need at most this much; the batches do not depend on it.
        buffer_samples: samples of a block, within which rows are put into a random order.
        seed: of every random order.
        world: processes that share the forward passes; every one of them holds the whole batch.
        dtype: of the batches.
        device: of the batches; None leaves them where the model is, or on the CPU from a store.

    Raises:
        ValueError: no source, a source that the model or store does not have, tokens without a passage, too short, or others
            than the store's.
    """

    def __init__(
        self,
        origin: HookedRecurrentModel | ActivationStore,
        tokens: Int[Tensor, "passage pos"],
        sources: Sequence[Source],
        *,
        batch_size: int = 256,
        passages_per_forward: int = 8,
        skip_positions: int = 1,
        cache_bytes: int = 1 << 29,
        buffer_samples: int = 65536,
        seed: int = 0,
        world: World | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not sources:
            raise ValueError("a stream needs at least one source")
        if batch_size < 1 or passages_per_forward < 1:
            raise ValueError(
                f"batch_size and passages_per_forward must be at least 1, got {batch_size} and {passages_per_forward}"
            )
        if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] <= skip_positions:
            shape = tuple(tokens.shape)
            raise ValueError(
                f"tokens must be [passage, pos > {skip_positions}] with a passage or more, got shape {shape}"
            )
        if isinstance(origin, ActivationStore):
            origin.check_tokens(tokens)
        self.origin, self.tokens, self.sources = origin, tokens, tuple(sources)
        self.skip, self.passages_per_forward, self.dtype = skip_positions, passages_per_forward, dtype
        self.world, self.seed, self.device = world or World(), seed, device
        self.about = {source: self._describe(source) for source in self.sources}
        self.order = Order(
            n_passages=len(tokens),
            per_passage=tokens.shape[1] - skip_positions,
            batch_size=batch_size,
            buffer_samples=max(buffer_samples, batch_size),
            seed=seed,
        )
        self.cached = self.order.n_blocks == 1 or len(tokens) * self._bytes_per_passage() <= cache_bytes
        self._held: tuple[tuple[int, int], Records] | None = None

    def __repr__(self) -> str:
        """One line: what is read off which text."""
        sources = ", ".join(str(source.hook) for source in self.sources)
        passages, length = self.tokens.shape
        return f"ActivationStream({sources} at {passages:,} passages of {length} tokens)"

    def n_samples(self, source: Source | None = None) -> int:
        """Samples of a source in one pass over the tokens; the same for all."""
        return self.order.n_passages * self.order.per_passage

    def batch(self, number: int) -> dict[Source, Samples]:
        """Batch `number`, counted from 0 without end."""
        place = self.order.place(number)
        # where everything is kept, the rows of a block are found by the numbers of its passages
        passages = self.order.passages(place.epoch, place.block) if self.cached else None
        records = self._block(0, 0) if self.cached else self._block(place.epoch, place.block)
        rows = self.order.rows(place)
        found = {}
        for source in self.sources:
            if self.about[source].kind == STATE:
                chosen = self.order.passage_rows(place, self._passages_per_batch(source, self.order.batch_size))
                chosen = chosen if passages is None else passages[chosen]
                generator = generator_of(self.seed, place.epoch, number)
                found[source] = self._states(source, records[source], chosen, self.order.batch_size, generator)
            else:
                found[source] = self._rows(source, records[source], rows, passages)
        return found

    def __iter__(self) -> Iterator[dict[Source, Samples]]:
        """Batches 0, 1, 2, ... without end."""
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def sample(self, n: int) -> dict[Source, Samples]:
        """About `n` samples of every source from passages chosen at random (all of them when there are fewer)."""
        generator = generator_of(self.seed, _SAMPLE)
        chosen = torch.randperm(self.order.n_passages, generator=generator)[: -(-n // self.order.per_passage)]
        records = self._block(0, 0) if self.cached else self._collect(chosen)
        places = chosen if self.cached else torch.arange(len(chosen))
        rows = torch.randperm(len(chosen) * self.order.per_passage, generator=generator)[:n]
        found = {}
        for source in self.sources:
            if self.about[source].kind == STATE:
                whole = places[: self._passages_per_batch(source, n)]
                found[source] = self._states(source, records[source], whole, n, generator_of(self.seed, _SAMPLE, 1))
            else:
                found[source] = self._rows(source, records[source], rows, places)
        return found

    def prepare(self, progress: Progress | None = None) -> None:
        """Compute the first block (everything, where it fits) now; `progress(done, total)` counts passages."""
        self._block(0, 0, progress)

    # --- inside ------------------------------------------------------------------------------------------------

    def _describe(self, source: Source) -> Described:
        if isinstance(self.origin, HookedRecurrentModel):
            return describe(self.origin, source)
        return self.origin.describe(source)

    def _bytes_per_passage(self) -> int:
        widths = 0
        for source, about in self.about.items():
            terms = 2 if about.kind == STATE or source.form == "net" else 1  # at most
            decay = about.d_k if about.vector_decay else 2
            widths += terms * (about.d_k + about.d_v) + (decay if about.kind == STATE else 0)
        return widths * self.tokens.shape[1] * self.dtype.itemsize

    def _passages_per_batch(self, source: Source, n: int) -> int:
        """Of how many passages `n` states are."""
        whole = max(1, n // self.order.per_passage)
        return max(whole, min(n, _FORMED_FROM)) if self.about[source].vector_decay else whole

    def _block(self, epoch: int, block: int, progress: Progress | None = None) -> Records:
        """The records of a block, or of everything in the order of the tokens; kept until others are asked for."""
        name = (0, 0) if self.cached else (epoch, block)
        if self._held is None or self._held[0] != name:
            self._held = None  # free the old block before the new one is made
            passages = torch.arange(len(self.tokens)) if self.cached else self.order.passages(*name)
            self._held = (name, self._collect(passages, progress))
        return self._held[1]

    def _collect(self, passages: Int[Tensor, " passage"], progress: Progress | None = None) -> Records:
        """Records of these passages, each process making its share of the forward passes."""
        groups = passages.split(self.passages_per_forward)
        # Whoever has nothing to do makes one all the same, and keeps none of it: shapes must be known to be exchanged.
        own = groups[self.world.share(len(groups))]
        keep, total = sum(map(len, own)), sum(map(len, own or groups[:1]))
        parts: list[Records] = []
        done = 0
        for rows in own or groups[:1]:
            parts.append(self._made(rows))
            done += len(rows)
            if progress:
                progress(done, total)
        found: Records = {}
        for source in self.sources:
            record = joined([part.pop(source) for part in parts])
            found[source] = {name: self._gathered(tensor[:keep]) for name, tensor in record.items()}
        return found

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, with as many terms as any of them needs."""
        if self.world.size > 1 and tensor.ndim == 4:
            terms = self.world.max_(torch.tensor(tensor.shape[2], device=tensor.device))
            (tensor,) = with_terms([tensor], int(terms))
        return self.world.all_gather(tensor)

    def _made(self, passages: Int[Tensor, " passage"]) -> Records:
        if isinstance(self.origin, HookedRecurrentModel):
            tokens = self.tokens[passages.to(self.tokens.device)]
            return collect(self.origin, tokens, self.sources, dtype=self.dtype, numbers=passages)
        found = self.origin.records(self.sources, passages)
        return {source: self._cast(record) for source, record in found.items()}

    def _cast(self, record: Record) -> Record:
        """A stored record in the stream's type; norms that rounding would contradict are left to be computed again."""
        narrower = any(torch.finfo(self.dtype).eps > torch.finfo(tensor.dtype).eps for tensor in record.values())
        narrower = narrower and self.dtype.itemsize < 4
        return {
            name: tensor if name in _WIDE else tensor.to(self.dtype)
            for name, tensor in record.items()
            if not (narrower and name == "squared_norm")
        }

    def _rows(
        self, source: Source, record: Record, rows: Int[Tensor, " sample"], passages: Int[Tensor, " passage"] | None
    ) -> Samples:
        """Rows ordered by (passage, position); `passages` says which place of the record is which passage."""
        passage, position = rows // self.order.per_passage, rows % self.order.per_passage + self.skip
        passage = passage if passages is None else passages[passage]
        at = next(iter(record.values())).device
        chosen = {name: tensor[passage.to(at), position.to(at)] for name, tensor in record.items()}
        return self._put(samples_of(self.about[source].kind, chosen))

    def _states(
        self, source: Source, record: Record, passages: Int[Tensor, " passage"], n: int, generator: torch.Generator
    ) -> Samples:
        """States of whole passages; where each has to be formed, about `n` of them at random positions."""
        chosen = {name: tensor[passages.to(tensor.device)] for name, tensor in record.items()}
        positions = None
        if self.about[source].vector_decay:
            each = min(-(-n // len(passages)), self.order.per_passage)
            noise = torch.rand(len(passages), self.order.per_passage, generator=generator)
            positions = noise.argsort(1)[:, :each].sort(1).values + self.skip
            positions = positions.to(chosen["key"].device)
        return self._put(state_samples(chosen, skip=self.skip, positions=positions, source=str(source)))

    def _put(self, samples: Samples) -> Samples:
        return samples if self.device is None else samples.to(self.device)


def split_passages(
    tokens: Int[Tensor, "passage pos"], heldout: float = 0.1, seed: int = 0
) -> tuple[Int[Tensor, "train pos"], Int[Tensor, "rest pos"]]:
    """Plain passages split at random into (train, held out): whole passages, and equal ones on the same side.

    Raises `ValueError` unless both sides get a passage. Text that comes in files is better split by file
    (`writesae.stream.corpus`).
    """
    different, which = torch.unique(tokens, dim=0, return_inverse=True)
    count = round(heldout * len(different))
    if not 0 < count < len(different):
        raise ValueError(
            f"heldout={heldout} of {len(different)} passages leaves one side of the split without a passage"
        )
    generator = generator_of(seed)
    unseen = torch.randperm(len(different), generator=generator)[:count].to(tokens.device)
    order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
    is_unseen = torch.isin(which[order], unseen)
    return tokens[order[~is_unseen]], tokens[order[is_unseen]]
