"""The rows of docs/results.md: where each of our numbers stands, the paper's beside it (arXiv:2605.12770), and its direction.

A row says `above` or `below` where an effect has a direction that should not depend on the model. What depends on it, or is
only reported, has none.
"""

from collections.abc import Iterator

from writesae.reproduce.rows import GDN, MAMBA, RWKV, Row
from writesae.reproduce.table_install import install_rows

READINGS = {"in_recurrence": "at t", "cache": "at t + 1, through the cache", "horizon": "mean of the next 16"}
NAMES = {"best_kl": "best, then KL"}


def _replacement() -> Iterator[Row]:
    paper = {GDN: "92.4% (91.6 to 93.1), n = 4,851", MAMBA: "88.1% (86.8 to 89.3), n = 2,500", RWKV: "45.3%, n = 6,591"}
    for run in ("best", "best_kl", "write", "state"):
        for reading, when in READINGS.items():
            where = {"run": run, "reading": reading, "pool": "dominant", "scale": "coef"}
            theirs = paper if (run, reading) == ("state", "cache") else {}
            above = None if run == "state" else 0.5  # whether the paper's objective wins is what the test asks
            label = f"{NAMES.get(run, run)}: wins, {when}"
            yield Row("replacement", label, "win_rate", where, "by_passage", paper=theirs, above=above)
    where = {"run": "best", "reading": "cache", "pool": "dominant", "scale": "coef"}
    chain = {GDN: "89.5%"}
    yield Row("replacement", "best: atom < delete < random, through the cache", "strict_chain", where, paper=chain)
    medians = {
        "atom": {GDN: "0.40 nats", MAMBA: "0.97 nats"},
        "delete": {GDN: "1.09 nats", MAMBA: "1.62 nats"},
        "random": {GDN: "2.02 nats", MAMBA: "2.32 nats"},
    }
    for name, theirs in medians.items():
        label = f"best: median KL of {name}, through the cache"
        yield Row("replacement", label, f"median_kl_{name}", where, form="nats", paper=theirs)
    for scale, label in (("norm", "at the native write's norm"), ("best", "at its least-squares coefficient")):
        where = {"run": "best", "reading": "cache", "pool": "dominant", "scale": scale}
        yield Row("replacement", f"best: wins {label}, through the cache", "win_rate", where, "by_passage")
    where = {"run": "best", "reading": "cache", "pool": "dominant", "scale": "coef"}
    yield Row("replacement", "firings", "n", where, form="count")
    yield Row("replacement", "atoms", "n_atoms", where, form="count")
    yield Row(
        "replacement", "floor: the native write for itself, largest KL", "floor_max", where, form="nats", below=1e-8
    )


def _heads() -> Iterator[Row]:
    for reading, when in READINGS.items():
        where = {"reading": reading, "pool": "dominant", "scale": "coef"}
        theirs = {GDN: "89.3%, 15 heads of a layer"} if reading == "cache" else {}
        yield Row("heads", f"mean over cells, {when}", "mean_win_rate", where, "range", paper=theirs, above=0.5)
    where = {"reading": "cache", "pool": "dominant", "scale": "coef"}
    yield Row("heads", "cells", "cells", where, form="count")
    yield Row("heads", "cells whose interval is above one half", "above_half", where)


def _population() -> Iterator[Row]:
    where = {"reading": "cache", "part": "all"}
    yield Row(
        "population", "mean over atoms, through the cache", "win_rate", where, "by_atom",
        paper={GDN: "89.8% (88.1 to 91.3)", MAMBA: "88.1%, 100 atoms"}, above=0.5,
    )  # fmt: skip
    for side, theirs in (("register", {GDN: "91.4%"}), ("bundle", {GDN: "89.0%"})):
        part = {"reading": "cache", "part": side}
        yield Row("population", f"{side} atoms", "win_rate", part, "by_atom", paper=theirs)
        yield Row("population", f"number of {side} atoms", "n_atoms", part, form="count")
    yield Row(
        "population", "register against bundle, Mann-Whitney p", "mann_whitney_p", where, form="number",
        paper={GDN: "0.24", MAMBA: "0.76"},
    )  # fmt: skip
    yield Row(
        "population", "win rate with cosine, Pearson r", "pearson", where, form="number", paper={GDN: "0.19", MAMBA: "0.008"}
    )  # fmt: skip


def _passage_test() -> Iterator[Row]:
    yield from (
        Row(
            "passage_test", f"{words}, bits per token", "change", {"pool": "dominant", "condition": name}, "by_passage",
            form="number", paper=theirs, above=above,
        )
        for name, words, theirs, above in (
            ("delete", "every firing's write deleted", {GDN: "+0.005"}, None),
            ("atom", "the atom in its place", {}, None),
            ("random_gaussian", "random writes of equal norm", {GDN: "+0.226"}, 0.0),
            ("delete_other", "as many other writes deleted", {}, None),
        )
    )  # fmt: skip


def _logits() -> Iterator[Row]:
    words = {"0.01": "1% of the native norm", "natural": "firing atoms at their amplitude", "1.0": "full native norm"}
    for run, cells in (("own_cell", "own cell"), ("four_cells", "four cells")):
        for size, amplitude in words.items():
            for predictor in ("three_factor", "in_layer", "first_order", "norm_exact", "norm_midpoint"):
                theirs, above = {}, None
                if (predictor, size) == ("three_factor", "natural") and run == "own_cell":
                    theirs = {GDN: "0.983 with a fitted scale", MAMBA: "-0.07"}
                if predictor == "first_order":
                    above = {"0.01": 0.999, "natural": 0.9}.get(size)
                if predictor == "norm_midpoint":
                    above = 0.95
                yield Row(
                    "logits", f"{predictor}, {amplitude}, {cells}", "r2",
                    {
                        "run": run, "tokens": "top", "size": size, "predictor": predictor,
                        "source": "firing" if size == "natural" else "all",
                    },
                    "r2_by_passage", form="r2", paper=theirs, above=above,
                )  # fmt: skip
    fitted = {"run": "own_cell", "tokens": "top", "size": "natural", "predictor": "first_order", "source": "firing"}
    for predictor in ("first_order", "norm_exact"):
        silent = {**fitted, "predictor": predictor, "source": "silent"}
        yield Row("logits", f"{predictor}, silent atoms at that amplitude", "r2", silent, "r2_by_passage", form="r2")
    pooled = {**fitted, "source": "all"}
    yield Row("logits", "first_order, firing and silent atoms together", "r2", pooled, "r2_by_passage", form="r2")
    shuffled = {**fitted, "predictor": "shuffled"}
    yield Row("logits", "null: another context's gradient, natural amplitude", "r2", shuffled, form="r2", below=0.1)
    yield Row(
        "logits",
        "first_order with one fitted slope per atom, natural amplitude",
        "r2_slope_per_atom",
        fitted,
        form="r2",
    )
    yield Row(
        "logits", "first_order: signs agree, natural amplitude", "sign_agreement", fitted,
        paper={GDN: "100% of 10,000"}, above=0.8,
    )  # fmt: skip


def _erase() -> Iterator[Row]:
    deleted = {"test": "erase", "half": "test", "condition": "delete", "token_kind": "preferred", "atom": "all"}
    for reading, when in READINGS.items():
        theirs = {GDN: "-0.116 (-0.265 to -0.042)"} if reading == "cache" else {}
        yield Row(
            "erase", f"preferred token, write deleted, {when}: median change of log p", "median",
            {**deleted, "reading": reading}, "median_interval", form="number", paper=theirs,
        )  # fmt: skip
    circular = {**deleted, "half": "same_half", "reading": "in_recurrence"}
    yield Row(
        "erase", "the same, chosen and tested on the same firings (circular), at t", "mean", circular, "mean_interval",
        form="number", below=0.0,
    )  # fmt: skip
    honest = {**deleted, "reading": "in_recurrence"}
    yield Row("erase", "chosen on other passages, at t: mean change", "mean", honest, "mean_interval", form="number")
    yield Row("erase", "and beyond a random token's", "minus_null", honest, "minus_null_interval", form="number")
    for dose in (1.0, 4.0):
        written = {**honest, "test": "write", "condition": "atom", "dose": dose}
        theirs = {GDN: {1.0: "+0.00003", 4.0: "+0.016"}[dose]}
        yield Row(
            "erase", f"atom written where it is silent, {dose:g} times its median: median change", "median", written,
            "median_interval", form="number", paper=theirs,
        )  # fmt: skip


def _sign_test() -> Iterator[Row]:
    for predictor, theirs in (("product", {GDN: "84.6% (83.0 to 86.2)"}), ("first_order", {})):
        where, above = {"key": "all", "predictor": predictor}, 0.6 if predictor == "first_order" else None
        yield Row(
            "sign_test", f"{predictor}: signs agree", "sign_agreement", where, "sign_agreement_by_passage", paper=theirs,
            above=above,
        )  # fmt: skip
        paper = {"r2": {GDN: "-0.06"}, "pearson": {GDN: "0.162"}} if predictor == "product" else {}
        yield Row("sign_test", f"{predictor}: R^2, nothing fitted", "r2", where, form="r2", paper=paper.get("r2", {}))
        yield Row(
            "sign_test", f"{predictor}: Pearson r", "pearson", where, form="number", paper=paper.get("pearson", {})
        )


def _steer() -> Iterator[Row]:
    paper = {2.0: "16.8 to 12.7", 5.0: "16.8 to 11.2", 10.0: "16.8 to 13.4"}
    for dose in (2.0, 5.0, 10.0):
        where = {"metric": "newlines", "condition": "atoms", "dose": dose}
        theirs = {GDN: paper[dose]} if dose in paper else {}
        yield Row(
            "steer", f"newlines, dose {dose:g}: steered - unsteered", "difference", where, "interval", form="number",
            paper=theirs,
        )  # fmt: skip
        yield Row(
            "steer", f"newlines, dose {dose:g}: atoms - other atoms of equal norm", "minus_other", where,
            "minus_other_interval", form="number",
        )  # fmt: skip


def _partition() -> Iterator[Row]:
    for run in ("state", "write"):
        where = {"run": run, "form": "additive"}
        papers = {
            "n_alive": {GDN: "316 of 2,048", MAMBA: "2,048", RWKV: "741"},
            "register_threshold": {GDN: "222", MAMBA: "217", RWKV: "200"},
            "bundle_threshold": {GDN: "94", MAMBA: "1,831", RWKV: "541"},
            "bic_2_minus_1": {GDN: "-296"},
        }
        for value, words in (
            ("n_alive", "alive atoms"),
            ("register_threshold", "register (cosine above 0.05)"),
            ("bundle_threshold", "bundle"),
            ("bic_2_minus_1", "BIC of two groups - of one (lower is better)"),
            ("components", "groups by the lowest BIC"),
        ):
            theirs = papers.get(value, {}) if run == "state" else {}
            yield Row("partition", f"{run}: {words}", value, where, form="count", paper=theirs)
        median = {GDN: "0.262", MAMBA: "0.058", RWKV: "0.180"} if run == "state" else {}
        yield Row(
            "partition", f"{run}: median cosine with the write", "median_cosine", where, "median_cosine_interval",
            form="number", paper=median, above=0.0,
        )  # fmt: skip
        yield Row(
            "partition", f"{run}: the same with another token's write", "null_median_cosine", where, form="number"
        )
        yield Row(
            "partition", f"{run}: atoms that another seed has too (cosine above 0.9)", "matched_seed_1_alive", where,
            paper={GDN: "below 1%"} if run == "state" else {},
        )  # fmt: skip


def _class_differences() -> Iterator[Row]:
    paper = {
        "delta_kl": "+0.109, p = 0.45", "flip_delete": "+0.294, p = 0.04", "flip_atom": "+0.161, p = 0.26",
        "firings": "+0.518, p < 0.001",
    }  # fmt: skip
    for measure, theirs in paper.items():
        where = {"measure": measure}
        yield Row(
            "class_differences", f"{measure}, Cliff's delta", "cliffs_delta", where, "delta_interval", form="number",
            paper={GDN: theirs},
        )  # fmt: skip
        yield Row("class_differences", f"{measure}, Holm's p", "p_holm", where, form="number")


def _selectivity() -> Iterator[Row]:
    for pair, words, theirs in (
        ("atom~gaussian", "atom against random", {GDN: "0.9953"}),
        ("gaussian~gaussian", "two random matrices: the check", {GDN: "0.998, orthogonal control"}),
    ):
        where = {"pair": pair, "K": 32}
        yield Row(
            "selectivity", f"K = 32, {words}", "selectivity", where, "interval", form="r2", paper=theirs, above=0.5
        )
    where = {"pair": "atom~gaussian", "K": 32}
    yield Row(
        "selectivity", "what the atom adds to the check", "minus_check", where, "minus_check_interval", form="number"
    )


def _readers() -> Iterator[Row]:
    where = {"atom": "all"}
    yield Row(
        "readers", "strongest reader of eight atoms together: its change over that of random deletions", "ratio", where,
        "ratio_interval", form="number", paper={GDN: "7.5, correlational"},
    )  # fmt: skip
    yield Row("readers", "its Holm p over later heads", "holm_ratio", where, form="number")


def _perplexity() -> Iterator[Row]:
    for run, variant, words, theirs in (
        ("state", "state", "all heads, state dictionaries", {GDN: "+0.58% to +1.33%"}),
        ("write", "writes", "all heads, write dictionaries", {}),
        ("state", "zero", "all heads emptied", {}),
        ("state", "mean", "all heads at their mean", {}),
    ):
        yield Row(
            "perplexity", f"{words}: rise in %", "percent", {"run": run, "variant": variant, "k": 4}, "percent_interval",
            form="number", paper=theirs,
        )  # fmt: skip
    for run, variant in (("state", "state"), ("write", "writes")):
        where = {"run": run, "variant": variant, "k": 1}
        yield Row(
            "perplexity", f"one head, {run} dictionary: rise in %", "percent", where, "percent_interval", form="number"
        )


def _baselines() -> Iterator[Row]:
    paper = {
        "rank1": {GDN: "91.25%", MAMBA: "82.85%", RWKV: "45.3%"},
        "flat_svd": {GDN: "91.36%", MAMBA: "76.30%", RWKV: "47.8%"},
    }
    words = {
        "rank1": "WriteSAE", "flat_svd": "FlatSAE + SVD of the reconstruction", "flat_atom": "FlatSAE + SVD of the atom",
        "rank2": "rank-2 atoms", "pca": "principal components", "one_for_all": "one outer product for all writes",
        "by_token": "one per token",
    }  # fmt: skip
    for method, label in words.items():
        for scale in ("norm", "coef"):
            where = {"reading": "cache", "method": method, "scale": scale}
            theirs = paper.get(method, {}) if scale == "norm" else {}
            yield Row(
                "baselines", f"{label}, {'native norm' if scale == 'norm' else 'own size'}: wins", "win_rate", where,
                "by_passage", paper=theirs,
            )  # fmt: skip


def _encoder_swap() -> Iterator[Row]:
    paper = {
        "flat": "2.58e-5", "rank1": "2.69e-5", "bilinear": "3.09e-5", "bilinear_flat": "3.35e-5", "bilinear_tied": "5.98e-5"
    }  # fmt: skip
    for preset, mse in paper.items():
        where = {"preset": preset, "reading": "cache", "stand_in": "atom_coef"}
        yield Row("encoder_swap", f"{preset}: held-out variance unexplained", "fvu", where, paper={GDN: f"MSE {mse}"})
        yield Row("encoder_swap", f"{preset}: wins, through the cache", "win_rate", where, "lowest_to_highest")
        yield Row("encoder_swap", f"{preset}: dead", "dead_fraction", where)


def _objectives() -> Iterator[Row]:
    names = ("state", "write", "net", "fisher", "single", "relative", "relative_kl")
    for reading, when in READINGS.items():
        for name in names:
            where, above = {"reading": reading, "objective": name}, 0.5 if name == "relative" else None
            yield Row("objectives", f"{name}, {when}", "win_rate", where, "by_passage", above=above)
        for name in names[1:]:
            where, above = {"reading": reading, "objective": name}, 0.0 if name == "relative" else None
            yield Row(
                "objectives", f"{name} over state, {when}", "ahead", where, "ahead_interval", form="points", above=above
            )  # fmt: skip
    for name in names:
        where = {"reading": "cache", "objective": name}
        yield Row("objectives", f"{name}: held-out variance unexplained", "fvu", where)
        yield Row("objectives", f"{name}: dead atoms", "dead_fraction", where)


ROWS: tuple[Row, ...] = (
    *_replacement(), *_heads(), *_population(), *_passage_test(), *_logits(), *_erase(), *_sign_test(), *install_rows(),
    *_steer(), *_partition(), *_class_differences(), *_selectivity(), *_readers(), *_perplexity(), *_baselines(),
    *_encoder_swap(), *_objectives(),
)  # fmt: skip
"""All rows, in the order of the page."""
