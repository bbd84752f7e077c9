"""The rows of docs/results.md about the install: one head, many heads at once, other strata and magnitudes."""

from collections.abc import Iterator
from typing import Any

from writesae.reproduce.rows import GDN, MAMBA, Row


def _install_spread(where: dict[str, Any]) -> Iterator[Row]:
    words = "sixteen heads at once"
    for condition in ("lambda_refined", "fixed_native_key", "random", "steering", "steering_gradient"):
        of = {**where, "condition": condition}
        yield Row("install", f"{words}, {condition}: the token appears", "inclusion", of, "inclusion_by_passage")
    refined = {**where, "condition": "lambda_refined"}
    for control, name in (
        ("native", "no edit"), ("random", "random directions"), ("fixed_native_key", "the paper's direction"),
        ("steering", "residual steering"), ("steering_gradient", "steering along its own gradient"),
    ):  # fmt: skip
        value = f"over_{control}"
        label = f"{words}, lambda_refined over {name}"
        yield Row("install", label, value, refined, f"{value}_by_passage", form="points", above=0.0)
    for condition in ("lambda_refined", "steering"):
        label = f"{words}, {condition}: collateral KL on other tokens"
        yield Row("install", label, "mean_collateral_kl", {**where, "condition": condition}, form="nats")


def install_rows() -> Iterator[Row]:
    """Every row of the step "install", in the order of the page."""
    middle = {"run": "middle", "cell": "auto", "stratum": "middle", "magnitude": 3.0}
    paper = {"fixed_native_key": {GDN: "100% (native 33.3%)", MAMBA: "no lift"}}
    conditions = (
        "lambda_refined", "lambda", "fixed_native_key", "fixed_next_query", "random", "steering", "steering_shorter",
        "steering_gradient",
    )  # fmt: skip
    for condition in conditions:
        where = {**middle, "condition": condition}
        label = f"rank 100 to 1,000, {condition}: the token appears"
        yield Row("install", label, "inclusion", where, "inclusion_by_passage", paper=paper.get(condition, {}))
    refined = {**middle, "condition": "lambda_refined"}
    yield Row("install", "without an edit", "native_inclusion", refined)
    for control, words, above in (
        ("native", "no edit", 0.0),
        ("random", "a random direction", 0.0),
        ("fixed_native_key", "the paper's direction", 0.0),
        ("steering", "residual steering of equal KL", 0.0),
        ("steering_shorter", "the best shorter one", None),
        ("steering_gradient", "the same along its own gradient", None),
    ):
        value = f"over_{control}"
        yield Row(
            "install", f"lambda_refined over {words}", value, refined, f"{value}_by_passage", form="points", above=above
        )  # fmt: skip
    yield from _install_spread({**middle, "run": "spread", "cell": "spread"})
    for condition in ("lambda_refined", "fixed_native_key", "random"):
        where = {**middle, "condition": condition}
        lift = {GDN: "+1.27 nats"} if condition == "fixed_native_key" else {}
        yield Row(
            "install",
            f"{condition}: first-step change of log p",
            "median_delta_logprob",
            where,
            form="nats",
            paper=lift,
        )
        yield Row("install", f"{condition}: collateral KL on other tokens", "mean_collateral_kl", where, form="nats")
    for stratum in ("frequent", "rare", "semantic"):
        where = {**middle, "run": "strata", "stratum": stratum, "condition": "lambda_refined"}
        yield Row(
            "install",
            f"{stratum}, lambda_refined: appears",
            "inclusion",
            where,
            "inclusion_by_passage",
            paper={GDN: "0%"},
        )
    for magnitude, theirs in ((1.5, "66.7%"), (6.0, "-")):
        where = {"run": "doses", "cell": "auto", "stratum": "middle", "magnitude": magnitude}
        label = f"rank 100 to 1,000, {magnitude:g} native norms"
        refined, fixed = ({**where, "condition": name} for name in ("lambda_refined", "fixed_native_key"))
        yield Row("install", f"{label}, lambda_refined", "inclusion", refined, "inclusion_by_passage")
        yield Row(
            "install", f"{label}, the paper's direction", "inclusion", fixed, "inclusion_by_passage", paper={GDN: theirs}
        )  # fmt: skip
