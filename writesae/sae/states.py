"""States as samples: every state of whole passages, known by running sums of what the tokens changed.

A state S_t = sum_{j <= t} D(t<-j) key_j value_j^T (net writes: `hooked_recurrent.memory.changes`) is a matrix of full rank, but
under one decay per head everything that a dictionary asks of it is a running sum of what the changes answer (running_sums.py).
So all states of a passage train a dictionary at the cost of their factors, and none of them is formed.

A decay per key channel (RWKV-7, Gated Linear Attention, Kimi Delta Attention) does not allow this: D(t<-j) stands between the
two sides then, another matrix for every pair of positions. `state_samples` forms those states, and says so.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent.memory import Changes
from writesae.sae.running_sums import Decays, running_sums, sum_back_, sums_at
from writesae.sae.samples import Inner, Matrices, Rows, Samples

_FORMED_AT_ONCE = 16  # states that are formed together where single ones are looked at


class StateSequences(Samples):
    """All states of whole passages under scalar decay; the samples are (passage, pos), pos running fastest.

    Every passage starts from an empty memory.
    """

    meets_vectors = False

    def __init__(
        self,
        log_decay: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        squared_norms: Float[Tensor, "..."] | None = None,
        skip: int = 0,
    ):
        """The net writes of one head.

        Args:
            log_decay: log d_t <= 0 [passage, pos]; -inf forgets everything.
            key, value: [passage, pos, term, d_k] and [passage, pos, term, d_v], S_t = d_t S_{t-1} + sum over terms of
                key value^T; the term axis may be left out.
            squared_norms: |S_t|^2 [passage, pos]; computed here, when first asked for, if not given.
            skip: the first positions of every passage count in the states behind them, but are no samples themselves.

        Raises:
            ValueError: shapes that do not fit, or a passage of which nothing is left after `skip`.
        """
        if log_decay.ndim != 2:
            raise ValueError(
                "running sums need one decay per position, log_decay [passage, pos], got shape "
                f"{tuple(log_decay.shape)}; state_samples takes a decay per key channel too"
            )
        if key.ndim not in (3, 4) or key.shape[:-1] != value.shape[:-1] or key.shape[:2] != log_decay.shape:
            came = f"{tuple(key.shape)} and {tuple(value.shape)} with log_decay {tuple(log_decay.shape)}"
            raise ValueError(f"key and value must be [passage, pos, d] or [passage, pos, term, d] alike, got {came}")
        if squared_norms is not None and squared_norms.shape != log_decay.shape:
            expected, got = tuple(log_decay.shape), tuple(squared_norms.shape)
            raise ValueError(f"squared_norms must be [passage, pos] = {expected}, got {got}")
        if not 0 <= skip < log_decay.shape[1]:
            raise ValueError(f"skip must leave some of the {log_decay.shape[1]} positions of a passage, got {skip}")
        self.key, self.value = ((side[:, :, None] if side.ndim == 3 else side).contiguous() for side in (key, value))
        self.log_decay = log_decay.double()  # sums of it are exponents
        self.skip, self.d_k, self.d_v = skip, key.shape[-1], value.shape[-1]
        self._norms = None if squared_norms is None else squared_norms.double()
        self._decays: dict[torch.dtype, Decays] = {}

    @property
    def n_passages(self) -> int:
        """Number of passages."""
        return self.log_decay.shape[0]

    @property
    def per_passage(self) -> int:
        """Samples of each passage: its positions from `skip` on."""
        return self.log_decay.shape[1] - self.skip

    def __len__(self) -> int:
        return self.n_passages * self.per_passage

    @property
    def dtype(self) -> torch.dtype:
        """Type of the net writes; norms and decays are kept in float64."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """Where the net writes are."""
        return self.value.device

    # --- other samples -----------------------------------------------------------------------------------------

    def scaled(self, factor: Float[Tensor, ""] | float) -> "StateSequences":
        """Every state times `factor`: values times it, squared norms times its square."""
        exact = factor.double() if isinstance(factor, Tensor) else factor
        made = StateSequences(self.log_decay, self.key, self.value * factor, self._all_norms() * exact**2, self.skip)
        made._decays = self._decays  # the very same, so that they are made once for all who ask
        return made

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "StateSequences":
        """The same states elsewhere or in another type."""
        device, dtype = torch.device(device or self.device), dtype or self.dtype
        if (device, dtype) == (self.device, self.dtype) == (self.key.device, self.key.dtype):
            return self
        key, value = (side.to(device=device, dtype=dtype) for side in (self.key, self.value))
        norms = self._all_norms().to(device=device)
        return StateSequences(self.log_decay.to(device=device), key, value, norms, self.skip)

    def passages(self, chosen: slice) -> "StateSequences":
        """The states of a slice of the passages."""
        norms = None if self._norms is None else self._norms[chosen]
        return StateSequences(self.log_decay[chosen], self.key[chosen], self.value[chosen], norms, self.skip)

    def take(self, rows: Rows) -> Samples:
        """A slice of whole passages by running sums, as before; any other choice of states as matrices, formed."""
        if isinstance(rows, slice):
            first, last, stride = rows.indices(len(self))
            if stride == 1 and first < last and first % self.per_passage == last % self.per_passage == 0:
                return self.passages(slice(first // self.per_passage, last // self.per_passage))
            rows = torch.arange(len(self), device=self.device)[rows]
        return Matrices(self._formed(rows))

    def blocks(self, size: int) -> Iterator["StateSequences"]:
        """In order, as many whole passages at a time as have no more than `size` samples; at least one."""
        at_once = max(1, size // self.per_passage)
        for start in range(0, self.n_passages, at_once):
            yield self.passages(slice(start, start + at_once))

    @classmethod
    def cat(cls, parts: "Sequence[StateSequences]") -> "StateSequences":
        """The passages of several as one; raises `ValueError` where length, skip, terms or widths differ."""
        shapes = {(part.skip, *part.key.shape[1:], part.d_v) for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"passages must have the same (skip, pos, term, d_k, d_v), got {sorted(shapes)}")
        known = [part._norms for part in parts if part._norms is not None]
        log_decay, key, value = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("log_decay", "key", "value")
        )
        norms = torch.cat(known) if len(known) == len(parts) else None
        return cls(log_decay, key, value, norms, parts[0].skip)

    # --- inner products ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def inner(self, left: Float[Tensor, "row d_k"], right: Float[Tensor, "row d_v"]) -> Inner:
        """l^T S_t r of every state and row by running sums; keeps the projections of the net writes.

        Never in a narrower type: what was scored so would have to be scored again in whole, and sums keep their errors.
        """
        with torch.autocast(self.device.type, enabled=False):
            by_key, by_value = self.key @ left.T, self.value @ right.T
            scores = by_key.new_empty(self.n_passages, self.per_passage, len(left))

            def changes(start: int, stop: int) -> Tensor:
                products = by_key[:, start:stop] * by_value[:, start:stop]
                return products.squeeze(2) if products.shape[2] == 1 else products.sum(2)

            for start, stop, sums in running_sums(self._decays_of(self.dtype), changes):
                if stop > self.skip:
                    first = max(start, self.skip)
                    scores[:, first - self.skip : stop - self.skip] = sums[:, first - start :]
            return Inner(scores.flatten(0, 1), (by_key, by_value))

    def inner_at(
        self,
        left: Float[Tensor, "row d_k"],
        right: Float[Tensor, "row d_v"],
        inner: Inner,
        indices: Int[Tensor, "sample chosen"],
    ) -> Float[Tensor, "sample chosen"]:
        """Scores at chosen rows; their gradient runs the sums backward and takes two matrix products."""
        (by_key, by_value), decays = inner.kept, self._decays_of(self.dtype)
        return sums_at(left, right, inner.scores, self.key, self.value, by_key, by_value, indices, decays)

    def inner_with_matrix(self, matrix: Float[Tensor, "d_k d_v"]) -> Float[Tensor, " sample"]:
        """<S_t, matrix> of every state: the running sum of key^T matrix value."""
        products, decays = ((self.key @ matrix) * self.value).sum((2, 3))[..., None], self._decays_of(self.dtype)
        parts = running_sums(decays, lambda start, stop: products[:, start:stop].clone())
        return torch.cat([sums for _, _, sums in parts], dim=1)[:, self.skip :].flatten()

    def squared_norms(self) -> Float[Tensor, " sample"]:
        """|S_t|^2 of every state."""
        return self._all_norms()[:, self.skip :].flatten().to(self.dtype)

    def mean(self) -> Float[Tensor, "d_k d_v"]:
        """Mean of the states, in float64: every net write counts as often as later states still hold it."""
        counts = torch.zeros_like(self.log_decay)[..., None]
        counts[:, self.skip :] = 1.0
        sum_back_(self._decays_of(torch.float64), counts, 0, None)
        weighted = self.key.double() * counts[..., None]
        return weighted.flatten(0, 2).T @ self.value.double().flatten(0, 2) / len(self)

    # --- the states themselves ---------------------------------------------------------------------------------

    def matrices(self) -> Float[Tensor, "sample d_k d_v"]:
        """Every state, formed: for references and dense dictionaries."""
        return formed_states(self.log_decay, self.key, self.value, skip=self.skip).flatten(0, 1)

    def leading(self, rows: Int[Tensor, " chosen"]) -> tuple[Float[Tensor, "chosen d_k"], Float[Tensor, "chosen d_v"]]:
        """Unit leading singular vectors of the chosen states, which are formed a few at a time."""
        keys, values = [self.key.new_zeros(0, self.d_k)], [self.value.new_zeros(0, self.d_v)]
        for some in rows.split(_FORMED_AT_ONCE):
            if len(some):
                key, value = Matrices(self._formed(some)).leading(torch.arange(len(some), device=self.device))
                keys.append(key)
                values.append(value)
        return torch.cat(keys), torch.cat(values)

    def _all_norms(self) -> Float[Tensor, "passage pos"]:
        """|S_t|^2 in float64, computed once if it was not given."""
        if self._norms is None:
            net = self.log_decay[..., None], self.key[:, :, None], self.value[:, :, None]
            with torch.no_grad():
                self._norms = Changes((0,), *net, initial_state=None).squared_norms()[..., 0]
        return self._norms

    def _decays_of(self, dtype: torch.dtype) -> Decays:
        if dtype not in self._decays:
            self._decays[dtype] = Decays(self.log_decay, dtype)
        return self._decays[dtype]

    def _formed(self, rows: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen d_k d_v"]:
        """The chosen states: on from one to the next of its passage, with one matrix product for what lies between."""
        states = self.key.new_empty(len(rows), self.d_k, self.d_v)
        numbers = [self._checked(row) for row in rows.tolist()]
        state, passage, position = None, -1, -1
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            there, wanted = divmod(numbers[place], self.per_passage)
            if there != passage:
                state, passage, position = None, there, -1
            wanted += self.skip
            if wanted > position:
                span = slice(position + 1, wanted + 1)
                # from the end: w_j is the sum over the steps behind j, and the whole sum is what the old state decays by
                steps = self.log_decay[passage, span].flip(0).cumsum(0).flip(0).exp()
                weights = torch.cat([steps[1:], steps.new_ones(1)]).to(self.dtype)
                weighted = (self.key[passage, span] * weights[:, None, None]).flatten(0, 1)
                added = weighted.T @ self.value[passage, span].flatten(0, 1)
                state = added if state is None else added.add_(steps[0].to(self.dtype) * state)
                position = wanted
            states[place] = state
        return states

    def _checked(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"state {row} is out of range: there are {len(self)}")
        return row % len(self)


def formed_states(
    log_decay: Float[Tensor, "passage pos *d_k"],
    key: Float[Tensor, "passage pos term d_k"],
    value: Float[Tensor, "passage pos term d_v"],
    *,
    skip: int = 0,
    positions: Int[Tensor, "passage chosen"] | None = None,
) -> Float[Tensor, "passage chosen d_k d_v"]:
    """States of passages that start from an empty memory, one position after the other, for either kind of decay.

    Args:
        log_decay: one number per position, or one per key channel.
        key, value: net writes.
        skip: without `positions`, every state from this position on is kept.
        positions: which are kept, in this order; the steps end with the last of them.
    """
    passages, length = log_decay.shape[:2]
    decay = log_decay.exp().to(value.dtype)
    decay = decay[..., None] if decay.ndim == 3 else decay[..., None, None]
    asked = [range(skip, length)] * passages if positions is None else positions.tolist()
    places: dict[int, list[tuple[int, int]]] = {}
    for passage, row in enumerate(asked):
        for place, position in enumerate(row):
            places.setdefault(position, []).append((passage, place))
    state = value.new_zeros(passages, key.shape[-1], value.shape[-1])
    kept = value.new_empty(passages, len(asked[0]) if asked else 0, *state.shape[1:])
    for position in range(max(places, default=-1) + 1):
        state = (decay[:, position] * state).baddbmm_(key[:, position].mT, value[:, position])
        if position in places:
            of, to = (list(side) for side in zip(*places[position], strict=True))
            kept[of, to] = state[of]
    return kept


def state_samples(
    record: Mapping[str, Tensor],
    *,
    skip: int = 0,
    positions: Int[Tensor, "passage chosen"] | None = None,
    source: str = "these states",
) -> Samples:
    """The states of one head's passages, in the way that its decay allows.

    Under scalar decay these are `StateSequences`, all of them at the cost of their factors. Under a decay per key channel,
    or where single positions are asked for, the states are formed, as `Matrices`; the first of these is told in a warning,
    once per source.

    Args:
        record: of one head, from an empty memory on: "log_decay" [passage, pos] or [passage, pos, d_k]; the net writes "key"
            [passage, pos, (term,) d_k] and "value" [passage, pos, (term,) d_v]; and, under scalar decay, "squared_norm"
            [passage, pos] (computed if missing).
        skip: positions at the start of every passage that are no samples.
        positions: the positions that are samples, each in skip..pos - 1; all by default. For a decay per key channel, where
            every state costs d_k d_v numbers; under scalar decay leave it out.
        source: what the warning calls these states.

    Raises:
        ValueError: a record that lacks a tensor, shapes that do not fit, or a position outside skip..pos - 1.
    """
    missing = [name for name in ("log_decay", "key", "value") if name not in record]
    if missing:
        raise ValueError(f"a record of states needs log_decay, key and value, and lacks {', '.join(missing)}")
    log_decay, key, value = record["log_decay"], record["key"], record["value"]
    length = log_decay.shape[1]
    if positions is not None and positions.numel() and not (skip <= positions.min() and positions.max() < length):
        came = f"{int(positions.min())}..{int(positions.max())}"
        raise ValueError(f"positions of states must lie in {skip}..{length - 1}, got {came}")
    if log_decay.ndim == 2:
        every = StateSequences(log_decay, key, value, record.get("squared_norm"), skip)
        if positions is None:
            return every
        begins = torch.arange(every.n_passages, device=positions.device)[:, None] * every.per_passage
        return every.take((begins + positions - skip).flatten())
    if key.ndim == 3:
        key, value = key[:, :, None], value[:, :, None]
    if log_decay.shape != (*key.shape[:2], key.shape[-1]) or key.shape[:-1] != value.shape[:-1]:
        came = ", ".join(str(tuple(side.shape)) for side in (log_decay, key, value))
        raise ValueError(f"log_decay, key and value of states do not fit each other: got {came}")
    _warn_once(source, key.shape[-1], value.shape[-1])
    return Matrices(formed_states(log_decay, key, value, skip=skip, positions=positions).flatten(0, 1))


@cache
def _warn_once(source: str, d_k: int, d_v: int) -> None:
    """One warning per source and process."""
    warnings.warn(
        f"{source}: every key channel decays at its own rate, so no running sum encodes these states and each one is formed: "
        f"{d_k} x {d_v} = {d_k * d_v} numbers per state, and about {d_k * d_v / (d_k + d_v):.0f} times the work of its factors",
        stacklevel=3,
    )
