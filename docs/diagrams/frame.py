"""What every block has in common: the residual stream, the norm, the six roles, the memory, the read and the MLP.

A rule (rules.py) says where its columns stand, draws what makes the roles, and what follows the read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from docs.diagrams.draw import Drawing, text

STREAM = 66
"""Where the residual stream runs down."""
BUS, PROJECT, UPSTREAM = 132, 172, 220
"""Heights of the normalised input, the projections and the first upstream hooks."""
HEAD = "[batch, pos, head]"


def of(width: str) -> str:
    """A shape per head."""
    return f"[batch, pos, head, {width}]"


@dataclass(frozen=True)
class Columns:
    """Where the six roles stand, in the order of the recurrence; what goes past the memory runs down at `beside`."""

    decay: float = 236
    erase: float = 352
    probe: float = 450
    key: float = 566
    value: float = 700
    query: float = 824
    beside: tuple[float, ...] = (926,)

    @property
    def right(self) -> float:
        """Where the panel ends."""
        return self.beside[-1] + 66


def opening(drawing: Drawing, columns: Columns, note: str = "") -> None:
    """The stream, ln1, and what is said beside them."""
    drawing.width = columns.right + 14
    drawing.hook("hook_resid_pre", STREAM, 52, "stream", "the residual stream as it comes, [batch, pos, d_model]")
    drawing.box("ln1", 192, 92, "ln1")
    drawing.hook("ln1.hook_scale", 262, 92, "stream", "what the stream is divided by")
    drawing.hook("ln1.hook_normalized", 376, 92, "stream", "the normalised stream, [batch, pos, d_model]")
    drawing.wire("ln1", "ln1.hook_scale", "ln1.hook_normalized", leave="right", enter="left", role="stream")
    drawing.under.append(text(150, 36, drawing.title, "title"))
    drawing.under.append(text(columns.right, 36, "dashed: a matrix per token, made only when you name it", "dim end"))
    drawing.under.append(text(456, 96, note, "dim left"))
    drawing.over.append(drawing.path(f"M{STREAM} 92 H175", "stream"))


def bus(drawing: Drawing, taps: Iterable[str]) -> None:
    """The normalised input, tapped by these projections."""
    places = [drawing.nodes[name] for name in taps]
    first, last = min(node.x for node in places), max(node.x for node in places)
    start = drawing.nodes["ln1.hook_normalized"].x
    lines = [drawing.path(f"M{start} 103 V{BUS}", "stream", False)]
    lines.append(drawing.path(f"M{min(first, start):.1f} {BUS} H{last:.1f}", "stream", False))
    for node in places:
        lines.append(drawing.path(f"M{node.x:.1f} {BUS} V{node.y - node.height / 2:.1f}", "stream"))
    drawing.under += lines


def roles(drawing: Drawing, columns: Columns, top: float, *, erases: bool = True, decay: str = HEAD) -> float:
    """The role hooks at this height and the memory below them; gives the height of the memory's lower edge."""
    at, y = columns, top
    drawing.hook("mixer.hook_log_decay", at.decay, y, "decay", f"log d_t, at most 0, {decay}")
    if erases:
        drawing.hook("mixer.hook_erase", at.erase, y, "erase", f"a_t, where the removal lands, {of('d_k')}")
        drawing.hook("mixer.hook_probe", at.probe, y, "erase", f"b_t, what the old state is asked, {of('d_k')}")
    drawing.hook("mixer.hook_write_key", at.key, y, "write", f"k_t, key side of the write alone, {of('d_k')}")
    drawing.hook("mixer.hook_write_value", at.value, y, "write", f"v_t, value side of the write alone, {of('d_v')}")
    drawing.hook("mixer.hook_query", at.query, y, "read", f"q_t, normalised and scaled, {of('d_k')}")
    return memory(drawing, columns, y, erases)


def memory(drawing: Drawing, columns: Columns, top: float, erases: bool) -> float:
    """The recurrence, its terms below their roles, and the loop to the next token; gives the lower edge."""
    at, line, bottom = columns, top + 80, top + 160
    left, right = at.decay - 80, at.query + 62
    drawing.under.append(
        f'<rect class="memory" x="{left}" y="{top + 40}" width="{right - left}" height="{bottom - top - 40}" rx="10"/>'
    )
    erase, write = (at.erase + at.probe) / 2, (at.key + at.value) / 2
    term(drawing, at.decay + 16, line, 94, "decay", "diag(d_t) S_{t-1}", {"log_decay": 0})
    if erases:
        term(drawing, erase, line, 120, "erase", "a_t (b_t^T S_{t-1})", {"erase": -32, "probe": 32})
    else:
        drawing.over.append(text(erase, top + 4, "nothing is erased", "dim"))
    term(drawing, write, line, 88, "write", "k_t v_t^T", {"write_key": -22, "write_value": 22})
    term(drawing, at.query, line, 104, "read", "o_t = S_t^T q_t", {"query": 0})
    drawing.over.append(text(at.decay - 55, line, "S_t =", "formula"))
    ends = [at.decay + 63, erase - 60, erase + 60, write - 44] if erases else [at.decay + 63, write - 44]
    for before, after in zip(ends[::2], ends[1::2], strict=True):
        drawing.over.append(text((before + after) / 2, line, "+", "formula"))
    about = f"as a matrix, only when named, {of('d_k, d_v')}"
    drawing.hook("mixer.hook_write", write, bottom - 19, "write", f"k_t v_t^T {about}", lazy=True)
    drawing.hook("mixer.hook_state", at.decay - 22, bottom - 19, "stream", f"S_t, after the write, {about}", lazy=True)
    drawing.over.append(drawing.path(f"M{write} {line + 9} V{bottom - 31}", "write"))
    loop = f"M{left} {bottom - 14} C{left - 22} {bottom - 14} {left - 22} {line - 5} {left - 2} {line - 5}"
    drawing.over.append(drawing.path(loop, "stream"))
    drawing.over.append(text(at.decay + 36, bottom - 15, "the memory of one head, carried to token t + 1", "dim left"))
    return bottom


def term(drawing: Drawing, x: float, line: float, width: float, role: str, words: str, hooks: dict[str, float]) -> None:
    """A term of the recurrence, and the wires of its roles down to it."""
    rect = f'<rect class="term {role}" x="{x - width / 2}" y="{line - 18}" width="{width}" height="27" rx="6"/>'
    drawing.over += [rect, text(x, line, words, "formula")]
    for hook, shift in hooks.items():
        (a, b), c, d = drawing.nodes[f"mixer.hook_{hook}"].port("bottom"), x + shift, line - 19
        drawing.over.append(
            drawing.path(f"M{a:.1f} {b:.1f} C{a:.1f} {b + 20:.1f} {c:.1f} {d - 22:.1f} {c:.1f} {d:.1f}", role)
        )


def closing(drawing: Drawing, columns: Columns, bottom: float, norm: str) -> float:
    """From the read to z and back into the stream; gives the lower edge of the mixer."""
    read, out = bottom + 34, bottom + 92
    at = columns
    drawing.hook("mixer.hook_read", at.query, read, "read", f"o_t, what the query reads, {of('d_v')}")
    drawing.over.append(drawing.path(f"M{at.query} {bottom - 71} V{read - 12}", "read"))
    drawing.box("norm", at.query, out, norm)
    drawing.hook("mixer.hook_z", at.value - 30, out, "read", f"just before W_O, {of('d_v')}")
    drawing.box("W_O", at.key + 10, out, "W_O")
    drawing.hook(
        "hook_mixer_out", (at.erase + at.probe) / 2 - 6, out, "stream", "what the mixer adds, [batch, pos, d_model]"
    )
    drawing.wire("mixer.hook_read", "norm", role="read")
    drawing.wire("norm", "mixer.hook_z", "W_O", role="read", leave="left", enter="right")
    drawing.wire("W_O", "hook_mixer_out", role="stream", leave="left", enter="right")
    joins(drawing, "hook_mixer_out", out)
    panel(drawing, columns, 58, out + 30, "mixer")
    return out + 30


def joins(drawing: Drawing, name: str, y: float) -> None:
    """A hook's activation goes left and is added to the stream."""
    x = drawing.nodes[name].port("left")[0]
    drawing.over.append(drawing.path(f"M{x:.1f} {y} H{STREAM + 12}", "stream"))
    drawing.over.append(f'<circle class="box" cx="{STREAM}" cy="{y}" r="10"/>{text(STREAM, y + 4.2, "+")}')


def panel(drawing: Drawing, columns: Columns, top: float, bottom: float, name: str) -> None:
    """The frame around a part of the block."""
    drawing.under.insert(
        0,
        f'<rect class="panel" x="146" y="{top}" width="{columns.right - 146}" height="{bottom - top}" rx="10"/>'
        + text(columns.right - 12, top + 17, name, "dim end"),
    )


def mlp(drawing: Drawing, columns: Columns, top: float, kind: str | None) -> None:
    """The second half of the block, and the end of the stream."""
    last = top + 34
    if kind is not None:
        first, second = top + 76, top + 124
        drawing.hook("hook_resid_mid", STREAM, top + 34, "stream", "the stream between mixer and MLP")
        drawing.box("ln2", 192, first, "ln2")
        drawing.hook("ln2.hook_scale", 262, first, "stream", "what the stream is divided by")
        drawing.hook("ln2.hook_normalized", 376, first, "stream", "the normalised stream")
        drawing.wire("ln2", "ln2.hook_scale", "ln2.hook_normalized", leave="right", enter="left", role="stream")
        drawing.hook("mlp.hook_post", 650, second, "up", "what W_down gets, [batch, pos, d_mlp]")
        drawing.box("down", 530, second, "W_{down}")
        drawing.hook("hook_mlp_out", 385, second, "stream", "what the MLP adds, [batch, pos, d_model]")
        if kind == "swiglu":
            drawing.box("mlp gate", 500, first, "W_{gate}")
            drawing.hook("mlp.hook_pre", 622, first, "up", "before the SiLU, [batch, pos, d_mlp]")
            drawing.box("mlp up", 500, first - 30, "W_{up}")
            drawing.hook("mlp.hook_pre_linear", 622, first - 30, "up", "the side without SiLU, [batch, pos, d_mlp]")
            drawing.box("act", 770, first, "SiLU(pre) × linear")
            drawing.wire(
                "ln2.hook_normalized", "mlp up", "mlp.hook_pre_linear", "act", leave="right", enter="left", role="up"
            )
        else:
            drawing.box("mlp gate", 520, first, "token shift, W_{up}")
            drawing.hook("mlp.hook_pre", 652, first, "up", "before ReLU and square, [batch, pos, d_mlp]")
            drawing.box("act", 770, first, "ReLU(pre)^2")
        drawing.wire("ln2.hook_normalized", "mlp gate", "mlp.hook_pre", "act", leave="right", enter="left", role="up")
        drawing.wire("act", "mlp.hook_post", role="up", leave="bottom", enter="right")
        drawing.wire("mlp.hook_post", "down", role="up", leave="left", enter="right")
        drawing.wire("down", "hook_mlp_out", role="stream", leave="left", enter="right")
        drawing.over.append(drawing.path(f"M{STREAM} {first} H175", "stream"))
        joins(drawing, "hook_mlp_out", second)
        panel(drawing, columns, first - 50, second + 26, "mlp")
        last = second + 50
    drawing.hook("hook_resid_post", STREAM, last, "stream", "the residual stream as it goes on, [batch, pos, d_model]")
    drawing.under.insert(0, drawing.path(f"M{STREAM} 18 V{last + 34}", "stream"))
    drawing.height = last + 44
