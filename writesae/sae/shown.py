"""What a dictionary shows of itself: a line, a table, one atom as a picture."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hooked_recurrent.display import matrix_map
from hooked_recurrent.display.html import card, details, table

if TYPE_CHECKING:  # a look at a dictionary does not load matplotlib
    from matplotlib.figure import Figure


class ShownSAE:
    """Gives a dictionary its repr of one line, its table for a notebook, and `figure`."""

    def alive(self: Any) -> int | None:
        """Atoms that fired in the last `dead_after` steps of training; None where the provenance tells of no training."""
        training = self.provenance.get("training") or {}
        dead_after = training.get("dead_after")
        return None if dead_after is None else int((self.steps_since_active < dead_after).sum())

    def figure(self: Any, atom: int) -> "Figure":
        """One atom as a heat map, its key factor down the left side and its value factor along the foot."""
        return matrix_map(self.atom(atom), title=f"atom {atom}")

    def __repr__(self: Any) -> str:
        """One line: how many atoms of what, the variant, and where it was trained, where that is known."""
        c, about = self.config, self.provenance
        alive = self.alive()
        counted = f"{c.n_atoms:,} atoms" + ("" if alive is None else f", {alive:,} alive")
        where = f"; {_site(about)}" if about.get("hook") else ""
        return (
            f"{type(self).__name__}({counted}, rank {c.rank}, {c.d_k} x {c.d_v}; {c.encoder} encoder, {c.decoder} decoder, "
            f"{c.activation}, k {c.k}{where})"
        )

    def _repr_html_(self: Any) -> str:
        """Shape, variant and origin; its quality as training measured it; the rest of its provenance behind a click."""
        c, about, alive = self.config, self.provenance, self.alive()
        training = about.get("training") or {}
        rank = c.rank if c.decoder == "outer_product" else None
        facts = {
            "atoms": c.n_atoms,
            "alive": None
            if alive is None
            else f"{alive:,} fired in the last {training['dead_after']} steps of training",
            "shape": f"{c.d_k} x {c.d_v}{'' if rank is None else f', rank {rank}'}",
            "encoder, decoder": f"{c.encoder}, {c.decoder}{', centred' if c.center else ''}",
            "activation": f"{c.activation}, k {c.k}",
            "matryoshka": ", ".join(map(str, c.matryoshka)) or None,
            "trained on": _site(about) if about.get("hook") else None,
            "weights": f"{sum(p.numel() for p in self.parameters()):,} {str(self.dtype).removeprefix('torch.')}",
        }
        parts = []
        metrics = about.get("metrics") or {}
        if metrics:
            parts.append(table(by_measure(metrics)))
        if training:
            told = [{"setting": name, "value": str(value)} for name, value in training.items()]
            parts.append(details("how it was trained", table(told, most=len(told))))
        return card(type(self).__name__, facts, parts)


def by_measure(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per measure, with a column per text that it was taken on."""
    names = dict.fromkeys(name for numbers in metrics.values() for name in numbers)
    return [{"measure": name, **{text: numbers.get(name) for text, numbers in metrics.items()}} for name in names]


def _site(about: dict[str, Any]) -> str:
    """Where a dictionary's samples come from, in words."""
    head = "" if about.get("head") is None else f", head {about['head']}"
    form = f" ({about['form']})" if about.get("form") else ""
    return f"{about['hook']}{head}{form} of {about.get('model') or 'an unnamed model'}"
