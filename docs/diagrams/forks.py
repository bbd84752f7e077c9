"""What an intervention has to compute anew, and what one plain pass has left for it: a picture of layers and positions."""

from docs.diagrams.draw import PLAIN_STYLE, text

LAYERS, TOKENS, CELL = 6, 16, 34
EDIT = (2, 9)
"""Layer and position of the edit."""
LEFT, TOP = 96, 52


def forks() -> str:
    """The picture: a grid of blocks by tokens, the latest layer on top."""
    width, height = LEFT + TOKENS * CELL + 250, TOP + LAYERS * CELL + 62
    parts = []
    for layer in range(LAYERS):
        for token in range(TOKENS):
            x, y = LEFT + token * CELL, TOP + (LAYERS - 1 - layer) * CELL
            kind, word = _kind(layer, token)
            parts.append(
                f'<rect class="{kind}" x="{x + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" rx="4"/>'
            )
            parts.append(text(x + CELL / 2, y + CELL / 2 + 4, word, "name") if word else "")
        parts.append(text(LEFT - 40, TOP + (LAYERS - 0.5 - layer) * CELL + 4, f"layer {layer}"))
    for token in range(TOKENS):
        label = {EDIT[1]: "t", EDIT[1] + 1: "t+1", EDIT[1] - 1: "t-1"}.get(token, "")
        parts.append(text(LEFT + (token + 0.5) * CELL, TOP + LAYERS * CELL + 20, label))
    parts.append(text(LEFT, 30, "An edit of layer l = 2 at token t, and what the logits at t + 1 need", "title"))
    legend = LEFT + TOKENS * CELL + 28
    for row, (kind, words) in enumerate(
        [("kept", "as it was; never run again"), ("state", "state before t, kept"), ("input", "input of layer l, kept")]
        + [("edit", "the edit"), ("again", "run again, per intervention"), ("later", "run only if wanted (horizon)")]
    ):
        y = TOP + 8 + row * 28
        parts.append(f'<rect class="{kind}" x="{legend}" y="{y}" width="18" height="18" rx="4"/>')
        parts.append(text(legend + 28, y + 13, words, "left"))
    about = "Below the edited layer and before the edited token nothing changes, so nothing there is computed again."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hookmap forks" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="What an intervention costs">\n<title>{about}</title>\n<style>{PLAIN_STYLE}{CELLS}</style>\n'
        + "\n".join(part for part in parts if part)
        + "\n</svg>\n"
    )


CELLS = """
.forks .kept { fill: var(--line); fill-opacity: 0.22; }
.forks .state { fill: var(--decay); fill-opacity: 0.25; stroke: var(--decay); stroke-width: 1.4; }
.forks .input { fill: var(--up); fill-opacity: 0.22; stroke: var(--up); stroke-width: 1.4; }
.forks .edit { fill: var(--write); fill-opacity: 0.35; stroke: var(--write); stroke-width: 2; }
.forks .again { fill: var(--read); fill-opacity: 0.25; stroke: var(--read); stroke-width: 1.4; }
.forks .later { fill: none; stroke: var(--read); stroke-dasharray: 4 3; }
"""


def _kind(layer: int, token: int) -> tuple[str, str]:
    """How a cell is drawn, and what is written on it."""
    edited_layer, t = EDIT
    if (layer, token) == EDIT:
        return "edit", "+"
    if layer >= edited_layer and token == t - 1:
        return "state", "S"
    if layer == edited_layer - 1 and token >= t:
        return "input", "x"
    if layer >= edited_layer and token >= t:
        return ("again" if token <= t + 1 else "later"), ""
    return "kept", ""
