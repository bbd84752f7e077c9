"""The likeliest next tokens of a text, and what a change does to them."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from hooked_recurrent.display.html import NEGATIVE, POSITIVE, card, one_line, render
from hooked_recurrent.display.text import plain

BAR = """<span style="display:inline-block;width:110px;height:9px;border-radius:2px;background:rgb(128 128 128 / .2)">
<span style="display:block;width:{{ width }}%;height:100%;border-radius:2px;background:rgb({{ hue }} / .85)"></span></span>"""
TABLE = """<div class="hv-wide"><table><thead><tr>{% for name in columns %}
<th{% if name != "token" %} class="hv-number"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for name in columns %}
<td{% if name != "token" %} class="hv-number"{% endif %}>{{ row[name] }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>"""


class NextTokens:
    """The next-token distribution at one place, beside that after a change where there is one.

    `table` has a row per shown token: id, token, before (a probability), and after and change (of the log-probability, in
    nats). `kl` is KL(before || after) over the whole vocabulary in nats, or None.
    """

    def __init__(self, table: pd.DataFrame, kl: float | None, title: str):
        self.table, self.kl, self.title = table, kl, title

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def __repr__(self) -> str:
        """One line: the three likeliest tokens, and the KL where there is one."""
        top = self.table.nlargest(3, "before")
        shown = ", ".join(f"{plain(row.token)!r} {row.before:.3f}" for row in top.itertuples())
        return f"NextTokens({shown}{'' if self.kl is None else f', KL {self.kl:.4g} nats after the change'})"

    def __str__(self) -> str:
        return self._repr_html_()

    def _repr_html_(self) -> str:
        """A bar per token, or two where something was changed."""
        columns = [name for name in ("token", "before", "after", "change") if name in self.table]
        top = max(float(self.table[name].max()) for name in columns if name in ("before", "after"))
        rows = []
        for row in self.table.to_dict("records"):
            shown: dict[str, str] = {"token": Markup('<bdi class="hv-token">{}</bdi>').format(one_line(row["token"]))}
            for name, hue in (("before", NEGATIVE), ("after", POSITIVE)):
                if name in row:
                    bar = render(BAR, width=f"{100 * row[name] / top if top > 0 else 0:.1f}", hue=hue)
                    shown[name] = Markup("{} {}").format(bar, f"{row[name]:.4f}")
            if "change" in row:
                shown["change"] = f"{row['change']:+.3f}"
            rows.append(shown)
        told = "" if self.kl is None else f"KL(before || after) = {self.kl:.4g} nats; change of log-probability in nats"
        return card(self.title, parts=[render(TABLE, columns=columns, rows=rows)], note=told)


def next_tokens_html(
    before: Float[Tensor, " d_vocab"],
    to_string: Callable[[int], Any],
    after: Float[Tensor, " d_vocab"] | None = None,
    *,
    top: int = 10,
    title: str = "next token",
) -> NextTokens:
    """The likeliest next tokens under some logits; with `after` those of either, and how each changed.

    Args:
        before: logits at one position, such as `model(tokens)[0, -1]`.
        to_string: what a token id says, such as `model.to_string`.
        after: logits at the same position of a changed run.
        top: how many tokens of each distribution to show.
        title: what stands above.

    Raises:
        ValueError: logits of more than one position or of two vocabularies, or a `top` that is not 1 or more.
    """
    if before.ndim != 1 or (after is not None and after.shape != before.shape):
        shapes = [tuple(logits.shape) for logits in (before, after) if logits is not None]
        raise ValueError(f"expected logits of one position [d_vocab], got {' and '.join(map(str, shapes))}")
    if top < 1:
        raise ValueError(f"top is how many tokens to show and must be 1 or more, got {top}")
    logs = [x.detach().double().cpu().log_softmax(-1) for x in (before, after) if x is not None]
    likeliest = [x.topk(min(top, len(x))).indices.tolist() for x in logs]
    ids = list(dict.fromkeys(index for chosen in likeliest for index in chosen))
    table = pd.DataFrame(
        {"id": ids, "token": [str(to_string(index)) for index in ids], "before": logs[0][ids].exp().numpy()}
    )
    if after is None:
        return NextTokens(table, None, title)
    table["after"], table["change"] = logs[1][ids].exp().numpy(), (logs[1] - logs[0])[ids].numpy()
    # 0 log 0 is 0: a token that cannot come adds nothing, even where its log-probability is minus infinity.
    kl = torch.where(logs[0].exp() > 0, logs[0].exp() * (logs[0] - logs[1]), 0.0).sum()
    return NextTokens(table, float(kl), title)
