"""Register and bundle: which atoms look like one native write, and which do not (WriteSAE, arXiv:2605.12770, appendix G).

At every firing of an atom A at a token whose native write is X, the signed Frobenius cosine <A, X> / (|A| |X|) is taken: of
the additive write k v^T, for which it is cos(v, k) cos(w, value) of the two sides, and of the net write, its erase included.
An atom's number is the median over its firings. Atoms near 0 (the paper's "bundle") are parts of a sum that only together
resemble a write; the others ("register") resemble one by themselves. Whether there are two groups at all is asked of Gaussian
mixtures by BIC, and of the bimodality coefficient.

Two nulls. Gaussian: independent random unit vectors have a mean |cosine| of sqrt(2 / pi) / sqrt(d), on each side. Empirical:
the same atoms at the same firings against the write of another random token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_recurrent import HookedRecurrentModel
from hooked_recurrent.config import StrictConfig, require_positive
from writesae.config import require_one_of
from writesae.evaluation.describing.distributions import best_mixture, mixtures
from writesae.evaluation.describing.matching import match_atoms
from writesae.evaluation.describing.partition_result import BUNDLE, FORMS, NULL, REGISTER, PartitionResult
from writesae.evaluation.firings import check_cell, check_passages, encode_cell
from writesae.evaluation.result import Told
from writesae.sae.codes import Codes
from writesae.sae.samples import Factored
from writesae.sae.write_sae import WriteSAE
from writesae.stream.sources import Source, collect, joined

ALIVE = ("fired", "frequent", "recent", "strong")
FREQUENT, RECENT, STRONG = 0.01, 100, 1e-8
_SAMPLES_AT_ONCE = 2048


@dataclass(frozen=True)
class PartitionConfig(StrictConfig):
    """Which atoms are looked at, and how they are told apart."""

    alive: str = "fired"
    """Which atoms that fire on these passages are alive: "fired", all of them (the paper's); "frequent", at a hundredth of the
    tokens; "recent", those that fired within the last 100 training batches; "strong", with a coefficient of 1e-8 or more."""
    strongest: int = 50
    """Firings of the largest coefficients over which |cosine| is averaged (the paper's code)."""
    components: int = 4
    """Most components of a mixture."""
    thresholds: tuple[float, ...] = (0.02, 0.03, 0.05, 0.10)
    """Cosines above which atoms are counted as register."""
    threshold: float = 0.05
    """The cosine that splits register and bundle without a mixture."""
    kept_per_atom: int = 10
    """Firings of an atom that the result keeps one by one, for tests between groups."""
    first_position: int = 8
    """Earliest position of a firing; position 0 always holds the same token."""
    seed: int = 0
    """Seed of the mixtures' starts, the empirical null and the kept firings."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"PartitionConfig.threshold is a cosine between 0 and 1, got {self.threshold!r}")
        require_one_of("PartitionConfig", "alive", self.alive, ALIVE)
        require_positive("PartitionConfig", strongest=self.strongest, components=self.components)
        require_positive("PartitionConfig", kept_per_atom=self.kept_per_atom)
        if self.first_position < 0:
            raise ValueError(f"PartitionConfig.first_position must be at least 0, got {self.first_position}")


@torch.no_grad()
def partition(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    *,
    layer: int,
    head: int,
    config: PartitionConfig | None = None,
    others: Sequence[WriteSAE] = (),
    on_progress: Told | None = None,
) -> PartitionResult:
    """Compare every atom with the native writes at which it fires, and split the alive ones.

    Args:
        model: any HookedRecurrentModel.
        sae: a dictionary of the cell.
        tokens: held-out passages.
        layer, head: the cell.
        config: criteria, cuts, seeds.
        others: dictionaries of the same cell from other seeds; each is matched with `sae`, alive atoms with alive ones too.
        on_progress: told (how many tokens are compared, how many there are).

    Raises:
        ValueError, IndexError: for a cell that does not exist or does not fit, other dictionaries of another shape, passages
            no longer than `first_position`, and passages on which no atom fires.
    """
    config = PartitionConfig.given(config)
    check_passages(tokens)
    if tokens.shape[1] <= config.first_position:
        need = config.first_position + 1
        raise ValueError(f"passages have {tokens.shape[1]} tokens; with this first_position they need at least {need}")
    for dictionary in (sae, *others):
        check_cell(model, dictionary, layer, head)
    writes = encode_cell(model, sae, tokens, layer, head)
    counted = slice(config.first_position, None)
    natives = {
        "additive": _flat(writes.key[:, counted], writes.value[:, counted]),
        "net": _net_writes(model, tokens, layer, head, counted),
    }
    codes = Codes(*(side[:, counted].flatten(0, 1) for side in (writes.codes.indices, writes.codes.values)))
    firings = pd.concat(_compared(sae, natives, codes, config, on_progress), ignore_index=True)
    if firings.empty:
        raise ValueError("no atom fires on these passages")
    table = _by_atom(sae, firings, len(codes.values), config)
    fitted: dict[str, list[dict[str, Any]]] = {}
    for form in FORMS:
        fits = mixtures(table.loc[table["alive"], f"cosine_{form}"], config.components, config.seed)
        fitted[form] = [asdict(fit) for fit in fits]
        two = fits[min(2, len(fits)) - 1]
        cosines = table[f"cosine_{form}"].to_numpy()
        table[f"mixture_{form}"] = _labels(table["alive"], two.upper(cosines) if two.n_components == 2 else None)
        table[f"threshold_{form}"] = _labels(table["alive"], cosines > config.threshold)
        table[f"component_{form}"] = np.where(
            table["alive"], best_mixture(fits).densities(np.nan_to_num(cosines)).argmax(0), -1
        )
    return PartitionResult(
        table,
        layer,
        head,
        config.to_dict(),
        firings=_kept(firings, config),
        mixtures=fitted,
        matches=_matches(model, sae, tokens, layer, head, config, table, others),
        shape=[sae.config.d_k, sae.config.d_v],
        tokens=len(codes.values),
    )


def _flat(key: Tensor, value: Tensor) -> Factored:
    return Factored(key.flatten(0, 1), value.flatten(0, 1))


def _net_writes(
    model: HookedRecurrentModel, tokens: Int[Tensor, "passage pos"], layer: int, head: int, counted: slice
) -> Factored:
    """All that each token changed in the memory, its erase included."""
    source = Source(f"blocks.{layer}.mixer.hook_write", head, "net")
    record = joined([collect(model, rows, [source])[source] for rows in tokens.split(8)])
    return _flat(record["key"][:, counted], record["value"][:, counted])


def cosines(sae: WriteSAE, samples: Factored, indices: Int[Tensor, "sample k"]) -> Float[Tensor, "sample k"]:
    """Signed Frobenius cosine of each sample with its chosen atoms; 0 where sample or atom is zero."""
    samples = samples.to(dtype=sae.dtype)
    norms = samples.squared_norms().sqrt()[:, None] * sae.decoder.norms()[indices]
    inner = sae.decoder.inner_at(samples, indices)
    return torch.where(norms > 0, inner / norms.where(norms > 0, 1.0), 0.0).clamp(-1, 1)


def _compared(
    sae: WriteSAE, natives: dict[str, Factored], codes: Codes, config: PartitionConfig, on_progress: Told | None
) -> Iterator[pd.DataFrame]:
    """A row per firing: atom, coefficient, and its cosine to the native write and to another token's, in both forms."""
    total = len(codes.values)
    # another token, never the same one: a random cycle
    order = torch.randperm(total, generator=torch.Generator().manual_seed(config.seed))
    elsewhere = torch.empty_like(order)
    elsewhere[order] = order.roll(1)
    sides = sae.config.decoder == "outer_product" and sae.config.rank == 1
    for rows in torch.arange(total).split(_SAMPLES_AT_ONCE):
        indices, active = codes.indices[rows], codes.active[rows]
        columns = {"atom": indices, "coefficient": codes.values[rows]}
        for form, native in natives.items():
            columns[f"cosine_{form}"] = cosines(sae, native.take(rows), indices)
            columns[f"null_{form}"] = cosines(sae, native.take(elsewhere[rows]), indices)
        if sides:
            here = natives["additive"].take(rows)
            for side, write, atoms in (
                ("key", here.key, sae.key_atoms[:, 0]),
                ("value", here.value, sae.value_atoms[:, 0]),
            ):
                columns[f"cosine_{side}"] = torch.cosine_similarity(write.to(atoms), atoms[indices], dim=-1)
        if on_progress is not None:
            on_progress(int(rows[-1]) + 1, total)
        yield pd.DataFrame({name: column[active].cpu().numpy() for name, column in columns.items()})


def _by_atom(sae: WriteSAE, firings: pd.DataFrame, n_tokens: int, config: PartitionConfig) -> pd.DataFrame:
    """A row per atom of the dictionary; what an atom that never fires lacks is NaN."""
    grouped = firings.groupby("atom")
    table = pd.DataFrame({"firings": grouped.size(), "max_coefficient": grouped["coefficient"].max()})
    measured = [name for name in firings if name.startswith("cosine_")]
    table = table.join(grouped[measured].median())
    strongest = (
        firings.sort_values("coefficient", ascending=False, kind="stable").groupby("atom").head(config.strongest)
    )
    by_atom = strongest["atom"]
    for form in FORMS:
        table[f"null_{form}"] = grouped[f"null_{form}"].median()
        for kind in ("cosine", "null"):
            table[f"strongest_{kind}_{form}"] = strongest[f"{kind}_{form}"].abs().groupby(by_atom).mean()
    if "cosine_key" in firings:
        # cosines of both sides, one geometric mean: the paper's code averages |cosine| of each side first
        means = [strongest[f"cosine_{side}"].abs().groupby(by_atom).mean() for side in ("key", "value")]
        table["strongest_geometric"] = np.sqrt(means[0] * means[1])
    table = table.reindex(range(sae.config.n_atoms)).rename_axis("atom").reset_index()
    table["firings"] = table["firings"].fillna(0).astype(int)
    table["max_coefficient"] = table["max_coefficient"].fillna(0.0)
    table["frequency"] = table["firings"] / n_tokens
    table["steps_since_active"] = sae.steps_since_active.cpu().numpy()
    for criterion, met in _criteria(table).items():
        table[f"alive_{criterion}"] = met & (table["firings"] > 0)
    table["alive"] = table[f"alive_{config.alive}"]
    if not table["alive"].any():
        raise ValueError(f"no atom is alive by the criterion {config.alive!r}")
    return table


def _criteria(table: pd.DataFrame) -> dict[str, pd.Series]:
    return {
        "fired": table["firings"] > 0,
        "frequent": table["frequency"] >= FREQUENT,
        "recent": table["steps_since_active"] < RECENT,
        "strong": table["max_coefficient"] >= STRONG,
    }


def _labels(alive: pd.Series, upper: np.ndarray | None) -> np.ndarray:
    """Register, bundle or null; with no upper group every alive atom is of one group, which is neither."""
    if upper is None:
        return np.where(alive, "one group", NULL)
    return np.where(alive, np.where(upper, REGISTER, BUNDLE), NULL)


def _kept(firings: pd.DataFrame, config: PartitionConfig) -> dict[str, list]:
    """A seeded choice of every atom's firings, as columns."""
    shuffled = firings.sample(frac=1, random_state=config.seed)
    some = shuffled.groupby("atom").head(config.kept_per_atom).sort_values("atom", kind="stable")
    names = ["atom", *(f"{kind}_{form}" for form in FORMS for kind in ("cosine", "null"))]
    return {name: [round(value, 6) for value in some[name].tolist()] for name in names}


def _matches(
    model: HookedRecurrentModel,
    sae: WriteSAE,
    tokens: Int[Tensor, "passage pos"],
    layer: int,
    head: int,
    config: PartitionConfig,
    table: pd.DataFrame,
    others: Sequence[WriteSAE],
) -> list[dict[str, Any]]:
    """How much of the dictionary each other one holds: all atoms, and those that fire on these passages."""
    alive = torch.from_numpy(table.loc[table["alive_fired"], "atom"].to_numpy(copy=True))
    rows = []
    for number, other in enumerate(others):
        codes = encode_cell(model, other, tokens, layer, head).codes
        counted = slice(config.first_position, None)
        fired = torch.unique(codes.indices[:, counted][codes.active[:, counted]]).cpu()
        for atoms, of_first, of_second in (("all", None, None), ("alive", alive, fired)):
            match = match_atoms(sae, other, of_first, of_second, config.seed)
            rows.append({"other": number, "atoms": atoms, **match.to_dict()})
    return rows
