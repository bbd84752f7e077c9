"""Samples of any number of sources, read off one forward pass per passage, in random order across passages.

    model, or a store on disk  ->  records of a block of passages  ->  batches {source: Samples}

Neighbouring tokens resemble each other, so a batch must mix passages. When all records fit into `cache_bytes` they are
computed once and kept; otherwise blocks of passages go through the model again in every epoch. `order.py` has the order: a
batch is found by its number, which is all that resuming needs.

Writes and vectors come as single rows. States come by whole passages where their running sums need that, and where every
state has to be formed (decay per key channel) as random positions of a few passages.
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
from writesae.stream.sources import STATE, Described, Record, Source, collect, describe, samples_of
from writesae.stream.store import ActivationStore

Progress = Callable[[int, int], None]
_FORMED_FROM = 8  # passages whose states are mixed in a batch where each state has to be formed
_SAMPLE = 1 << 20  # third number of the generator of samples for calibration, beyond any epoch


class ActivationStream:
    """Batches {source: Samples} by number, all sources at the same tokens. See the module's docstring.

    Args:
        origin: the language model, which is run without gradients; or a store, which needs no model.
        tokens: passages, all of one length.
        sources: what to read off them.
        batch_size: samples per batch (fewer when there are not as many in all; whole passages of states, at least one, give at
            most as many where a passage fits).
        passages_per_forward: passages in one forward pass.
        skip_positions: positions left out at the start of every passage.
        cache_bytes: keep all records in memory when they need at most this much.
        buffer_samples: samples of a block otherwise.
        seed: of every random order.
        world: processes that share the forward passes; every one of them holds the whole batch.
        dtype: of the batches.

    Raises:
        ValueError: no source, a source that the model does not have, tokens without a passage or too short.
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
    ):
        if not sources:
            raise ValueError("a stream needs at least one source")
        if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] <= skip_positions:
            shape = tuple(tokens.shape)
            raise ValueError(
                f"tokens must be [passage, pos > {skip_positions}] with a passage or more, got shape {shape}"
            )
        self.origin, self.tokens, self.sources = origin, tokens, tuple(sources)
        self.skip, self.passages_per_forward, self.dtype = skip_positions, passages_per_forward, dtype
        self.world, self.seed = world or World(), seed
        self.about = {source: self._describe(source) for source in self.sources}
        per_passage = tokens.shape[1] - skip_positions
        self.cached = len(tokens) * self._bytes_per_passage() <= cache_bytes
        self.order = Order(
            n_passages=len(tokens),
            per_passage=per_passage,
            batch_size=batch_size,
            buffer_samples=len(tokens) * per_passage if self.cached else max(buffer_samples, batch_size),
            seed=seed,
            passages_per_batch=self._passages_per_batch(batch_size, per_passage),
        )
        self._held: tuple[tuple[int, int], dict[Source, Record]] | None = None

    def n_samples(self, source: Source | None = None) -> int:
        """Samples of a source in one pass over the tokens; the same for all."""
        return self.order.n_passages * self.order.per_passage

    def batch(self, number: int) -> dict[Source, Samples]:
        """Batch `number`, counted from 0 without end."""
        place = self.order.place(number)
        records = self._block(place.epoch, place.block)
        rows = self.order.rows(place)
        passages = self.order.passage_rows(place) if self.order.passages_per_batch else None
        return {
            source: self._rows(source, records[source], rows)
            if passages is None or self.about[source].kind != STATE
            else self._states(source, records[source], passages, generator_of(self.seed, place.epoch, number))
            for source in self.sources
        }

    def __iter__(self) -> Iterator[dict[Source, Samples]]:
        """Batches 0, 1, 2, ... without end."""
        number = 0
        while True:
            yield self.batch(number)
            number += 1

    def sample(self, n: int) -> dict[Source, Samples]:
        """About `n` samples of every source from passages chosen at random (all of them when there are fewer)."""
        generator = generator_of(self.seed, _SAMPLE)
        order = torch.randperm(self.order.n_passages, generator=generator)
        if not self.cached:
            order = order[: -(-n // self.order.per_passage)]
        records = self._chosen(order)
        rows = torch.randperm(len(order) * self.order.per_passage, generator=generator)[:n]
        whole = torch.arange(min(len(order), max(1, n // self.order.per_passage)))
        return {
            source: self._states(source, records[source], whole, generator, n)
            if self.about[source].kind == STATE
            else self._rows(source, records[source], rows)
            for source in self.sources
        }

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

    def _passages_per_batch(self, batch_size: int, per_passage: int) -> int | None:
        states = [about for about in self.about.values() if about.kind == STATE]
        if not states:
            return None
        wanted = _FORMED_FROM if any(about.vector_decay for about in states) else batch_size // per_passage
        return min(max(1, wanted), len(self.tokens))

    def _block(self, epoch: int, block: int, progress: Progress | None = None) -> dict[Source, Record]:
        """The records of a block: kept until another one is asked for."""
        name = (0 if self.order.n_blocks == 1 else epoch, block)
        if self._held is None or self._held[0] != name:
            self._held = None  # free the old block before the new one is made
            self._held = (name, self._collect(self.order.passages(*name), progress))
        return self._held[1]

    def _chosen(self, passages: Int[Tensor, " passage"]) -> dict[Source, Record]:
        """Records of these passages: out of memory, where all of them are."""
        if not self.cached:
            return self._collect(passages)
        everything = self._block(0, 0)
        return {
            source: {n: t[passages.to(t.device)] for n, t in record.items()} for source, record in everything.items()
        }

    def _collect(self, passages: Int[Tensor, " passage"], progress: Progress | None = None) -> dict[Source, Record]:
        """Records of these passages, each process making its share."""
        share = self.world.share(len(passages))
        # Whoever has nothing to do makes one all the same, and keeps none of it: shapes must be known to be exchanged.
        own = passages[share] if share.stop > share.start else passages[:1]
        parts: list[dict[Source, Record]] = []
        for rows in own.split(self.passages_per_forward):
            parts.append(self._made(rows))
            if progress:
                progress(sum(len(next(iter(part[self.sources[0]].values()))) for part in parts), len(own))
        keep = share.stop - share.start
        gathered: dict[Source, Record] = {}
        for source in self.sources:
            names = parts[0][source]
            joined = {name: torch.cat([part[source][name] for part in parts])[:keep] for name in names}
            gathered[source] = {name: self.world.all_gather(tensor) for name, tensor in joined.items()}
        return gathered

    def _made(self, passages: Int[Tensor, " passage"]) -> dict[Source, Record]:
        if isinstance(self.origin, HookedRecurrentModel):
            found = collect(self.origin, self.tokens[passages.to(self.tokens.device)], self.sources)
        else:
            found = self.origin.records(self.sources, passages)
        return {source: {n: self._cast(n, t) for n, t in record.items()} for source, record in found.items()}

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if name == "squared_norm" else tensor.to(self.dtype)

    def _rows(self, source: Source, record: Record, rows: Int[Tensor, " sample"]) -> Samples:
        passage, position = rows // self.order.per_passage, rows % self.order.per_passage + self.skip
        chosen = {}
        for name, tensor in record.items():
            chosen[name] = tensor[passage.to(tensor.device), position.to(tensor.device)]
        return samples_of(self.about[source].kind, chosen)

    def _states(
        self,
        source: Source,
        record: Record,
        passages: Int[Tensor, " passage"],
        generator: torch.Generator,
        count: int | None = None,
    ) -> Samples:
        """States of whole passages; where each has to be formed, `count` (a batch) of them at random positions."""
        chosen = {name: tensor[passages.to(tensor.device)] for name, tensor in record.items()}
        positions = None
        if self.about[source].vector_decay:
            each = -(-(count or self.order.batch_size) // len(passages))
            noise = torch.rand(len(passages), self.order.per_passage, generator=generator)
            picked = noise.argsort(1)[:, : min(each, self.order.per_passage)].sort(1).values
            positions = (picked + self.skip).to(chosen["key"].device)
        return state_samples(chosen, skip=self.skip, positions=positions, source=str(source))


def split_passages(
    tokens: Int[Tensor, "passage pos"], heldout: float = 0.1, seed: int = 0
) -> tuple[Int[Tensor, "train pos"], Int[Tensor, "rest pos"]]:
    """Plain passages split at random into (train, held out), whole passages on either side.

    Raises `ValueError` unless both sides get a passage. Text that comes in files is better split by file
    (`writesae.stream.corpus`).
    """
    count = round(heldout * len(tokens))
    if not 0 < count < len(tokens):
        raise ValueError(f"heldout={heldout} of {len(tokens)} passages leaves one side of the split without a passage")
    order = torch.randperm(len(tokens), generator=generator_of(seed)).to(tokens.device)
    return tokens[order[count:]], tokens[order[:count]]
