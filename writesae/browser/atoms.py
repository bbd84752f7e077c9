"""A plain record of every atom of a dictionary, from one model and one text: what `page.py` shows.

The text is run three times, each time a few passages at once: for the codes of all tokens (`encode_cell`), for what the atoms
would do to the logits (`readout.py`), and for the replacement test of the most frequent atoms. Atoms may be outer products of
any rank or whole matrices; the dictionary may be one of writes, net writes or states; the model of any rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from hooked_recurrent.files import plain
from writesae.browser.contexts import Firings, cut, fires_on, histogram
from writesae.browser.data import BUNDLE, REGISTER, SILENT, AtomBrowserData, Contexts, Listed
from writesae.browser.readout import Sampled, extreme_tokens, mean_change
from writesae.config import require_at_least_zero
from writesae.evaluation.describing.partition import cosines
from writesae.evaluation.firings import CellWrites, check_cell, encode_cell, trained_on
from writesae.evaluation.replacing.replacement import NoFirings, ReplacementConfig, replacement
from writesae.sae.samples import Factored
from writesae.sae.write_sae import WriteSAE

Told = Callable[[str, int, int], None]
"""Told (the stage: "codes", "readout" or "replace"; how much of it is done; how much there is)."""
_ATOMS_AT_ONCE, _WRITES_AT_ONCE, _PASSAGES_AT_ONCE = 256, 2048, 8


@dataclass(frozen=True)
class BrowserConfig(StrictConfig):
    """How much is shown of every atom, and how much is measured."""

    top_contexts: int = 8
    """Strongest firings shown, one per passage."""
    random_contexts: int = 4
    """Firings shown that are drawn at random from all others."""
    before: int = 20
    """Tokens shown before a firing."""
    after: int = 10
    """Tokens shown after it."""
    bins: int = 24
    """Bars of the histogram of coefficients."""
    listed: int = 10
    """Tokens listed as promoted, suppressed, and fired on."""
    neighbours: int = 8
    """Nearest atoms listed."""
    readout_firings: int = 8
    """Firings of an atom over which the predicted shift of the logits is averaged."""
    tested_atoms: int = 128
    """Atoms, the most frequent first, whose firings are replaced in the model; 0 for none."""
    firings_per_atom: int = 5
    """Most firings at which one of them is replaced."""
    first_position: int = 8
    """Earliest position of a replacement, so that the state holds something."""
    threshold: float = 0.05
    """Median cosine to the native writes from which on an atom counts as register (the paper's cut)."""
    seed: int = 0
    """Seed of what is drawn at random."""

    def __post_init__(self) -> None:
        owner = "BrowserConfig"
        require_positive(owner, bins=self.bins, listed=self.listed, neighbours=self.neighbours)
        require_positive(owner, readout_firings=self.readout_firings, firings_per_atom=self.firings_per_atom)
        require_positive(owner, top_contexts=self.top_contexts)
        require_at_least_zero(owner, random_contexts=self.random_contexts, before=self.before, after=self.after)
        require_at_least_zero(owner, tested_atoms=self.tested_atoms, first_position=self.first_position)


@torch.no_grad()
def collect(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    files: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    config: BrowserConfig | None = None,
    on_progress: Told | None = None,
) -> AtomBrowserData:
    """Read a text with a model and describe every atom of a dictionary by it.

    Args:
        model: any HookedRecurrentModel with a tokenizer.
        sae: a dictionary of one of its cells: of writes, net writes or states, with atoms of any kind.
        tokens: held-out passages.
        layer, head: the cell.
        files: per passage, the name of its file.
        about: what else the page should say of the run, as plain JSON values.
        config: how much is shown and measured, and the seed.
        on_progress: told (stage, done, total).

    Raises:
        ValueError, IndexError: before anything runs, for a cell that does not exist or does not fit, a model without a
            tokenizer, names of files that are not one per passage, and passages too short for the replacement test.
    """
    config, tell = config or BrowserConfig(), on_progress or (lambda stage, done, total: None)
    _check(model, sae, tokens, layer, head, files, config)
    writes = _encoded(model, sae, tokens, layer, head, tell)
    indices, values = (side.cpu().numpy() for side in (writes.codes.indices, writes.codes.values))
    text, n_atoms = tokens.cpu().numpy(), sae.config.n_atoms
    firings = Firings.of(indices, values, n_atoms)
    form = trained_on(sae, layer, head).form
    table = _table(sae, writes, firings, form, config)
    measured, floor = _replaced(model, sae, tokens, layer, head, table, config, tell)
    promoted, suppressed = _predicted(model, sae, tokens, firings, layer, head, config, tell)
    pieces = {"top": config.top_contexts, "random": config.random_contexts}
    contexts = cut(firings, text, indices, values, **pieces, before=config.before, after=config.after, seed=config.seed)
    word_lists = [fires_on(firings, text, config.listed), promoted, suppressed]
    words, ids, contexts, word_lists = _numbered(model, contexts, word_lists)
    key, value, leading = leading_factors(sae)
    return AtomBrowserData(
        about={**_about(model, sae, tokens, layer, head, form, config), "floor": floor, **plain(dict(about or {}))},
        words=words,
        word_ids=ids,
        files=list(files) or [f"passage {row}" for row in range(len(tokens))],
        atoms=table.join(measured),
        key=key,
        value=value,
        leading=leading,
        histogram=histogram(firings, config.bins),
        contexts=contexts,
        fires_on=word_lists[0],
        promoted=word_lists[1],
        suppressed=word_lists[2],
        neighbours=nearest(sae, config.neighbours),
    )


def _check(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Tensor,
    layer: int,
    head: int,
    files: Sequence[str],
    config: BrowserConfig,
) -> None:
    check_cell(model, sae, layer, head)
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, and the page shows text: load it with its tokenizer")
    if files and len(files) != len(tokens):
        raise ValueError(f"files must name one file per passage: {len(files)} names for {len(tokens)} passages")
    if config.tested_atoms and tokens.shape[1] < (need := config.first_position + 3):
        raise ValueError(
            f"passages have {tokens.shape[1]} tokens; to replace writes from position {config.first_position} on they need "
            f"at least {need} (or set tested_atoms to 0)"
        )


def _encoded(
    model: HookedRecurrentModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int, tell: Told
) -> CellWrites:
    """`encode_cell` in pieces that can be told of."""
    net = trained_on(sae, layer, head).form == "net"
    parts = []
    for rows in tokens.split(_PASSAGES_AT_ONCE):
        parts.append(encode_cell(model, sae, rows, layer, head, net=net))
        tell("codes", sum(len(part.key) for part in parts), len(tokens))
    return joined(parts)


def joined(parts: Sequence[CellWrites]) -> CellWrites:
    """The writes of several texts as those of one."""
    codes = type(parts[0].codes)
    flat = codes.concatenate([part.codes.reshape(torch.Size([part.norms.numel()])) for part in parts])
    key, value = (torch.cat([getattr(part, side) for part in parts]) for side in ("key", "value"))
    sides = [[getattr(part, side) for part in parts] for side in ("net_key", "net_value")]
    net = [None if any(one is None for one in side) else torch.cat(side) for side in sides]
    return CellWrites(key, value, flat.reshape(key.shape[:2]), *net)


def _table(sae: WriteSAE, writes: CellWrites, firings: Firings, form: str, config: BrowserConfig) -> pd.DataFrame:
    """Firings, sizes and cosines of every atom."""
    cosine = median_cosine(sae, writes, form)
    median, largest = np.full(len(cosine), np.nan), np.full(len(cosine), np.nan)
    for atom, rows in firings.each():
        median[atom], largest[atom] = np.median(firings.coefficient[rows]), firings.coefficient[rows.start]
    silent = firings.counts == 0
    kind = np.where(silent, SILENT, np.where(cosine >= config.threshold, REGISTER, BUNDLE))
    columns = {"firings": firings.counts, "rate": firings.counts / writes.norms.numel(), "median": median}
    return pd.DataFrame({**columns, "largest": largest, "cosine": cosine, "kind": kind})


@torch.no_grad()
def median_cosine(sae: WriteSAE, writes: CellWrites, form: str = "additive") -> Float[np.ndarray, " atom"]:
    """Per atom the median over its firings of its Frobenius cosine to the native write of this form; NaN where silent."""
    codes = writes.codes.reshape(torch.Size([writes.norms.numel()]))
    if form == "net":
        assert writes.net_key is not None and writes.net_value is not None  # asked of encode_cell
        samples = Factored(writes.net_key.flatten(0, 1), writes.net_value.flatten(0, 1))
    else:
        samples = Factored(writes.key.flatten(0, 1), writes.value.flatten(0, 1))
    found = []
    for rows in torch.arange(len(codes.values)).split(_WRITES_AT_ONCE):
        made, active = cosines(sae, samples.take(rows), codes.indices[rows]), codes.active[rows]
        atoms = codes.indices[rows][active].cpu().numpy()
        found.append(pd.DataFrame({"atom": atoms, "cosine": made[active].double().cpu().numpy()}))
    medians = pd.concat(found).groupby("atom")["cosine"].median()
    return medians.reindex(range(sae.config.n_atoms)).to_numpy(dtype=float)


def _replaced(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Tensor,
    layer: int,
    head: int,
    table: pd.DataFrame,
    config: BrowserConfig,
    tell: Told,
) -> tuple[pd.DataFrame, float | None]:
    """The replacement test of the most frequent atoms: its columns for every atom, and the floor."""
    columns = pd.DataFrame(index=table.index, columns=["kl_atom", "kl_delete", "kl_random"], dtype=float)
    columns = columns.assign(tested=0, won=0)
    often = table["firings"].sort_values(ascending=False, kind="stable").head(config.tested_atoms)
    atoms = tuple(int(str(atom)) for atom in often[often > 0].index)
    if not atoms:
        return columns, None
    test = ReplacementConfig(
        atoms=atoms,
        per_atom=config.firings_per_atom,
        total=config.firings_per_atom * len(atoms),
        horizon=1,
        first_position=config.first_position,
        readings=("in_recurrence",),
        seed=config.seed,
    )
    try:
        result = replacement(
            model, sae, tokens, layer=layer, head=head, config=test, on_progress=lambda *of: tell("replace", *of)
        )
    except NoFirings:
        return columns, None
    names = {"kl_atom_listed_coef": "kl_atom", "kl_delete": "kl_delete", "kl_random_listed_coef": "kl_random"}
    rows = result.table.rename(columns=names)
    grouped = rows.assign(won=rows["kl_atom"] < rows["kl_delete"]).groupby("atom")
    columns.update(grouped[list(names.values())].median())
    columns.update(grouped.agg(tested=("won", "size"), won=("won", "sum")))
    return columns, result.floor()[1]


def _predicted(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Tensor,
    firings: Firings,
    layer: int,
    head: int,
    config: BrowserConfig,
    tell: Told,
) -> tuple[Listed, Listed]:
    rows = firings.some(config.readout_firings, config.seed)
    rows = rows[np.argsort(firings.passage[rows], kind="stable")]
    columns = (firings.atom, firings.passage, firings.position, firings.coefficient)
    sampled = Sampled(*(torch.from_numpy(column[rows]) for column in columns))
    change = mean_change(
        model, sae, tokens, sampled, layer=layer, head=head, on_progress=lambda *of: tell("readout", *of)
    )
    blocks = zip(*extreme_tokens(change, model.W_U.detach(), config.listed), strict=True)
    made = [torch.cat(block).double().cpu().numpy() for block in blocks]
    silent = (firings.counts == 0)[:, None]
    found = [
        Listed(np.where(silent, -1, index.astype(np.int64)), np.where(silent, 0.0, number))
        for index, number in (made[:2], made[2:])
    ]
    return found[0], found[1]


def leading_factors(
    sae: WriteSAE,
) -> tuple[Float[np.ndarray, "atom d_k"], Float[np.ndarray, "atom d_v"], Float[np.ndarray, " atom"]]:
    """Key side, value side and the share of the squared norm that they hold; of rank one the factors as they are."""
    if sae.config.decoder == "outer_product" and sae.config.rank == 1:
        key, value = sae.key_atoms[:, 0].detach(), sae.value_atoms[:, 0].detach()
        return key.float().cpu().numpy(), value.float().cpu().numpy(), np.ones(len(key), dtype=np.float32)
    keys, values, shares = [], [], []
    for block in sae.decoder.matrices().split(_ATOMS_AT_ONCE):
        u, s, vh = torch.linalg.svd(block.float().cpu(), full_matrices=False)
        keys.append(u[:, :, 0] * s[:, :1])
        values.append(vh[:, 0])
        shares.append(s[:, 0].square() / s.square().sum(1).clamp_min(torch.finfo(s.dtype).tiny))
    return torch.cat(keys).numpy(), torch.cat(values).numpy(), torch.cat(shares).numpy()


@torch.no_grad()
def nearest(sae: WriteSAE, count: int) -> Listed:
    """Per atom the others with the largest Frobenius cosine, (v_i . v_j)(w_i . w_j) for unit atoms of rank one."""
    n_atoms, norms = sae.config.n_atoms, sae.atom_norms().double().clamp_min(1e-30)
    count = min(count, n_atoms - 1)
    found = []
    for block in torch.arange(n_atoms, device=norms.device).split(_ATOMS_AT_ONCE):
        cosine = _inner(sae, block) / (norms[block, None] * norms)
        cosine[torch.arange(len(block)), block] = -torch.inf  # every atom is nearest to itself
        found.append(cosine.topk(count, dim=1))
    index, number = (torch.cat([getattr(one, side) for one in found]) for side in ("indices", "values"))
    return Listed(index.cpu().numpy(), number.cpu().numpy())


def _inner(sae: WriteSAE, block: Int[Tensor, " some"]) -> Float[Tensor, "some atom"]:
    """<A_i, A_j> of some atoms with all."""
    if sae.config.decoder == "dense":
        atoms = sae.decoder.atoms.detach().flatten(1).double()
        return atoms[block] @ atoms.T
    keys, values = sae.key_atoms.detach().double(), sae.value_atoms.detach().double()
    terms = range(sae.config.rank)
    products = [
        (keys[block, mine] @ keys[:, other].T) * (values[block, mine] @ values[:, other].T)
        for mine in terms
        for other in terms
    ]
    return torch.stack(products).sum(0)


def _numbered(
    model: HookedRecurrentModel, contexts: Contexts, lists: list[Listed]
) -> tuple[list[str], np.ndarray, Contexts, list[Listed]]:
    """Every token by its place in the one list of texts."""
    flat = np.concatenate([contexts.word.ravel(), *(one.index.ravel() for one in lists)])
    ids = np.unique(flat[flat >= 0])

    def place(tokens: np.ndarray) -> np.ndarray:
        return np.where(tokens < 0, -1, np.searchsorted(ids, tokens))

    words = model.to_str_tokens(torch.from_numpy(ids)) if len(ids) else []
    again = Contexts(**{**vars(contexts), "word": place(contexts.word)})
    return words, ids, again, [Listed(place(one.index), one.number) for one in lists]


def _about(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Tensor,
    layer: int,
    head: int,
    form: str,
    config: BrowserConfig,
) -> dict[str, Any]:
    hook = trained_on(sae, layer, head).hook
    what = "states" if hook.endswith("state") else "net writes" if form == "net" else "writes"
    return {
        "model": model.cfg.model_name,
        "rule": model.cfg.mixer.rule,
        "layer": layer,
        "head": head,
        "hook": hook,
        "form": form,
        "what": what,
        "sae_config": plain(sae.config.to_dict()),
        "passages": int(tokens.shape[0]),
        "length": int(tokens.shape[1]),
        "readout": "in_layer",
        "browser": plain(config.to_dict()),
    }
