"""Writes of one head, streamed from the model by hook name, as factors, in random order across passages.

A `hook_write` is a matrix per token and is never computed for this: its two factor hooks hold the same in d_k + d_v
numbers.

Neighbouring tokens resemble each other, so a batch must mix passages. When all factors fit into `cache_bytes` they are
computed once, kept, and drawn in a new random order every epoch. Otherwise the passages go through the model in a
random order into a buffer, which is shuffled whenever it is full and emptied by half. Either order follows from the
seed.
"""

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel

SUPPORTED = "blocks.{layer}.mixer.hook_write"
_NAME = re.compile(r"blocks\.(\d+)\.mixer\.hook_write")
Progress = Callable[[int, int], None]
Batch = tuple[Float[Tensor, "batch d_k"], Float[Tensor, "batch d_v"]]


def layer_of_hook(model: HookedRecurrentModel, hook: str) -> int:
    """The layer whose writes `hook` names.

    Raises `ValueError` for a name that is no hook of the model (with the nearest one), and for hooks that a WriteSAE
    cannot be trained on.
    """
    if hook in model.hook_dict:
        if match := _NAME.fullmatch(hook):
            return int(match.group(1))
        raise ValueError(f"a WriteSAE is trained on {SUPPORTED}, not on {hook!r}")
    writes = [name for name in model.hook_dict if _NAME.fullmatch(name)]
    if match := _NAME.fullmatch(hook):
        layers = [int(_NAME.fullmatch(name).group(1)) for name in writes]  # type: ignore[union-attr]
        raise ValueError(f"layer {match.group(1)} has no writes; the recurrent layers of this model are {layers}")
    near = get_close_matches(hook, writes, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ", and no writes at all"
    raise ValueError(f"this model has no hook {hook!r}{hint}")


def check_head(model: HookedRecurrentModel, head: int) -> None:
    """Raise `ValueError` unless the model's recurrent layers have a head of this number."""
    if not 0 <= head < model.cfg.n_heads:
        raise ValueError(f"head must be 0..{model.cfg.n_heads - 1}, got {head}")


@torch.no_grad()
def collect_writes(
    model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], hook: str, head: int
) -> tuple[Float[Tensor, "passage pos d_k"], Float[Tensor, "passage pos d_v"]]:
    """Write keys and values of one head at every position of these passages: one forward pass.

    Raises `ValueError` for a wrong hook or head, and for NaN or infinity, naming hook, passage and position.
    """
    layer = layer_of_hook(model, hook)
    check_head(model, head)
    names = [f"blocks.{layer}.mixer.hook_write_key", f"blocks.{layer}.mixer.hook_write_value"]
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=names)
    found = []
    for name in names:
        activation = cache[name][:, :, head]
        if not torch.isfinite(activation).all():
            passage, position = (~torch.isfinite(activation)).any(-1).nonzero()[0].tolist()
            raise ValueError(f"NaN or infinity in {name}, head {head}, at position {position} of passage {passage}")
        found.append(activation.clone())  # a copy, so that the activations of the other heads can be freed
    return found[0], found[1]


class WriteStream:
    """Endless random batches (key [batch, d_k], value [batch, d_v]) of the writes of one head. See the module
    docstring.

    Args:
        model: the language model; it is run without gradients.
        tokens: passages, all of one length.
        hook: "blocks.{layer}.mixer.hook_write".
        head: value head.
        batch_size: writes per batch (fewer when there are not as many in all).
        passages_per_forward: passages in one forward pass.
        skip_positions: positions left out at the start of every passage.
        cache_bytes: keep all factors in memory when they need at most this much.
        buffer_writes: size of the shuffle buffer otherwise.
        seed: of every random order.
        dtype: of the batches.
    """

    def __init__(
        self,
        model: HookedRecurrentModel,
        tokens: Int[Tensor, "passage pos"],
        hook: str,
        head: int,
        *,
        batch_size: int = 256,
        passages_per_forward: int = 8,
        skip_positions: int = 1,
        cache_bytes: int = 1 << 29,
        buffer_writes: int = 65536,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.layer = layer_of_hook(model, hook)
        check_head(model, head)
        if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] <= skip_positions:
            shape = tuple(tokens.shape)
            raise ValueError(
                f"tokens must be [passage, pos > {skip_positions}] with a passage or more, got shape {shape}"
            )
        self.model, self.tokens, self.hook, self.head = model, tokens, hook, head
        self.batch_size, self.passages_per_forward, self.skip = batch_size, passages_per_forward, skip_positions
        self.buffer_writes = max(buffer_writes, batch_size)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.cached = self.n_writes * (model.cfg.d_k + model.cfg.d_v) * dtype.itemsize <= cache_bytes
        self._memory: Batch | None = None

    @property
    def n_writes(self) -> int:
        """Writes in one pass over the tokens."""
        return len(self.tokens) * (self.tokens.shape[1] - self.skip)

    def all_writes(self, progress: Progress | None = None) -> Batch:
        """Every write in the order of the tokens, kept for later calls; `progress(done, total)` counts passages."""
        if self._memory is None:
            blocks, done = [], 0
            for rows in torch.arange(len(self.tokens)).split(self.passages_per_forward):
                blocks.append(self._writes_of(rows))
                done += len(rows)
                if progress:
                    progress(done, len(self.tokens))
            self._memory = torch.cat([key for key, _ in blocks]), torch.cat([value for _, value in blocks])
        return self._memory

    def sample(self, n: int) -> Batch:
        """About `n` writes of passages chosen at random (all of them when there are fewer), for calibration."""
        if self.cached:
            key, value = self.all_writes()
            rows = self._order(len(key))[:n].to(key.device)
            return key[rows], value[rows]
        wanted = -(-n // (self.tokens.shape[1] - self.skip))
        chosen = self._order(len(self.tokens))[:wanted]
        blocks = [self._writes_of(rows) for rows in chosen.split(self.passages_per_forward)]
        return torch.cat([key for key, _ in blocks])[:n], torch.cat([value for _, value in blocks])[:n]

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end; every iterator goes on with the stream's one random order."""
        return self._from_memory() if self.cached else self._from_buffer()

    def _order(self, n: int) -> Int[Tensor, " n"]:
        return torch.randperm(n, generator=self.generator)

    def _writes_of(self, rows: Int[Tensor, " row"]) -> Batch:
        tokens = self.tokens[rows.to(self.tokens.device)]
        factors = collect_writes(self.model, tokens, self.hook, self.head)
        key, value = (factor[:, self.skip :].flatten(0, 1).to(self.dtype) for factor in factors)
        return key, value

    def _from_memory(self) -> Iterator[Batch]:
        key, value = self.all_writes()
        size = min(self.batch_size, len(key))
        while True:
            order = self._order(len(key)).to(key.device)
            for start in range(0, len(key) - size + 1, size):
                rows = order[start : start + size]
                yield key[rows], value[rows]

    def _from_buffer(self) -> Iterator[Batch]:
        key = value = None
        for more_key, more_value in self._forwards():
            key = more_key if key is None else torch.cat([key, more_key])
            value = more_value if value is None else torch.cat([value, more_value])
            if len(key) < self.buffer_writes:
                continue
            order = self._order(len(key)).to(key.device)
            key, value = key[order], value[order]
            while len(key) > max(self.buffer_writes // 2, self.batch_size):
                yield key[: self.batch_size], value[: self.batch_size]
                key, value = key[self.batch_size :], value[self.batch_size :]

    def _forwards(self) -> Iterator[Batch]:
        while True:
            for rows in self._order(len(self.tokens)).split(self.passages_per_forward):
                yield self._writes_of(rows)
