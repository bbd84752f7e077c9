"""The rules as pictures: which projections make which roles, and where each hook sits on the way."""

from docs.diagrams.draw import Drawing
from docs.diagrams.frame import HEAD, PROJECT, UPSTREAM, Columns, bus, closing, mlp, of, opening, roles

ABOUT = (
    "One block: the residual stream on the left, the mixer with its hooks, and how each activation reaches the memory."
)
MAKE = 304
"""Height of the boxes that make the roles, where nothing stands between them and the first upstream hooks."""


def upstream(drawing: Drawing, places: dict[str, tuple[float, str]], hooks: dict[str, str]) -> None:
    """Projections in a row, box to (x, words), and below each of `hooks` (box to what it shows) its hook."""
    for name, (x, words) in places.items():
        drawing.box(name, x, PROJECT, words)
    bus(drawing, places)
    for name, about in hooks.items():
        drawing.hook(f"mixer.hook_{name}", places[name][0], UPSTREAM, "up", about)
        drawing.wire(name, f"mixer.hook_{name}", role="up")


def made(drawing: Drawing, columns: Columns, height: float, words: dict[str, str]) -> None:
    """The boxes that make the roles, role to words, each above its hook."""
    for role, how in words.items():
        drawing.box(role, getattr(columns, role), height, how)


def feeds(drawing: Drawing, role: str, color: str, *sources: str) -> None:
    """Wires from what a role is made of to its box, and on to its hook."""
    for source in sources:
        drawing.wire(source, role, role=color)
    names = {"decay": "log_decay", "key": "write_key", "value": "write_value"}
    drawing.wire(role, f"mixer.hook_{names.get(role, role)}", role=color)


def delta_rule(
    title: str, decay: tuple[str, str], made_of: dict[str, str], channel: bool, z: str, norm: str
) -> Drawing:
    """The three rules that erase along the key: (how the decay is projected and made), the roles, the gate and the norm."""
    drawing, at = Drawing(title, ABOUT), Columns()
    opening(drawing, at)
    places = {
        "step": (at.decay, decay[0]),
        "beta": (at.erase, "W_b, sigmoid"),
        "k": (506, "W_k, conv, SiLU"),
        "v": (at.value - 12, "W_v, conv, SiLU"),
        "q": (at.query, "W_q, conv, SiLU"),
        "z": (at.beside[0], z),
    }
    places = {name: place for name, place in places.items() if place[1]}
    hooks = {
        "beta": f"write strength in (0, 1), in the write and in the erase, {HEAD}",
        "k": f"before the L2 norm; in the write and in the erase, {of('d_k')}",
        "v": of("d_v"),
        "q": f"before the L2 norm, {of('d_k')}",
    }
    upstream(drawing, places, hooks)
    made(drawing, at, MAKE, {"decay": decay[1], "key": "k / |k|", "value": "β v", "query": "q / (|q| √d_k)"} | made_of)
    bottom = roles(drawing, at, MAKE + 54, decay=of("d_k") if channel else HEAD)
    feeds(drawing, "decay", "decay", *(["step"] if decay[0] else []))
    feeds(drawing, "erase", "erase", "mixer.hook_beta", "mixer.hook_k")
    feeds(drawing, "probe", "erase", "mixer.hook_k")
    feeds(drawing, "key", "write", "mixer.hook_k")
    feeds(drawing, "value", "write", "mixer.hook_beta", "mixer.hook_v")
    feeds(drawing, "query", "read", "mixer.hook_q")
    end = closing(drawing, at, bottom, norm)
    if z:
        drawing.wire("z", "norm", enter="right")
    mlp(drawing, at, end, "swiglu")
    return drawing


def gated_delta_net() -> Drawing:
    """Gated DeltaNet: one decay per head, in the erase too."""
    roles_of = {"erase": "-d β k / |k|", "probe": "k / |k|"}
    decay = ("W_a, softplus", "× -exp(A)")
    drawing = delta_rule("Gated DeltaNet", decay, roles_of, False, "W_z", "RMSNorm × SiLU(z)")
    drawing.wire("decay", "erase", role="decay", leave="right", enter="left")
    return drawing


def delta_net() -> Drawing:
    """DeltaNet: no decay."""
    return delta_rule("DeltaNet", ("", "0"), {"erase": "-β k / |k|", "probe": "k / |k|"}, False, "", "RMSNorm")


def kimi_delta_attention() -> Drawing:
    """Kimi Delta Attention: a decay per channel, and a probe of the state that has already decayed."""
    roles_of = {"erase": "-β k / |k|", "probe": "d k / |k|"}
    decay = ("W, low rank", "-exp(A) softplus")
    drawing = delta_rule("Kimi Delta Attention", decay, roles_of, True, "W_z", "RMSNorm × sigmoid(z)")
    under = drawing.nodes["decay"].port("bottom"), drawing.nodes["probe"].port("bottom")
    y = under[0][1] + 7
    drawing.under.append(
        drawing.path(f"M{under[0][0] + 20:.1f} {under[0][1]} V{y} H{under[1][0] - 14:.1f} V{under[1][1]}", "decay")
    )
    return drawing


def gated_linear_attention() -> Drawing:
    """Gated Linear Attention: a decay per channel, nothing erased."""
    drawing, at = Drawing("Gated Linear Attention", ABOUT), Columns()
    opening(drawing, at)
    places = {
        "step": (at.decay, "W, low rank"),
        "k": (at.key, "W_k"),
        "v": (at.value, "W_v"),
        "q": (at.query, "W_q"),
        "z": (at.beside[0], "W_z"),
    }
    upstream(drawing, places, {"k": of("d_k"), "v": of("d_v"), "q": of("d_k")})
    made(drawing, at, MAKE, {"decay": "log sigmoid / 16", "key": "k", "value": "v", "query": "q / √d_k"})
    bottom = roles(drawing, at, MAKE + 54, erases=False, decay=of("d_k"))
    feeds(drawing, "decay", "decay", "step")
    feeds(drawing, "key", "write", "mixer.hook_k")
    feeds(drawing, "value", "write", "mixer.hook_v")
    feeds(drawing, "query", "read", "mixer.hook_q")
    end = closing(drawing, at, bottom, "RMSNorm × SiLU(z)")
    drawing.wire("z", "norm", enter="right")
    mlp(drawing, at, end, "swiglu")
    return drawing


def mamba2() -> Drawing:
    """Mamba-2: one decay per head, nothing erased, a skip beside the memory."""
    drawing, at = Drawing("Mamba-2", ABOUT), Columns(beside=(930, 1040))
    opening(drawing, at)
    places = {
        "dt": (at.decay + 6, "W_{dt}, softplus"),
        "k": (at.key, "W_B, conv, SiLU"),
        "v": (at.value, "W_x, conv, SiLU"),
        "q": (at.query, "W_C, conv, SiLU"),
        "z": (at.beside[1], "W_z"),
    }
    hooks = {
        "dt": f"step size, in the decay and in the write, {HEAD}",
        "k": f"B, {of('d_k')}",
        "v": f"x; in the write and in the skip, {of('d_v')}",
        "q": f"C, {of('d_k')}",
    }
    upstream(drawing, places, hooks)
    made(drawing, at, MAKE, {"decay": "-exp(A) dt", "key": "B", "value": "dt x", "query": "C"})
    bottom = roles(drawing, at, MAKE + 54, erases=False)
    feeds(drawing, "decay", "decay", "mixer.hook_dt")
    feeds(drawing, "key", "write", "mixer.hook_k")
    feeds(drawing, "value", "write", "mixer.hook_dt", "mixer.hook_v")
    feeds(drawing, "query", "read", "mixer.hook_q")
    end = closing(drawing, at, bottom, "(o + D x) SiLU(z),\nRMSNorm")
    drawing.box("skip", at.beside[0], MAKE, "D x")
    drawing.hook("mixer.hook_skip", at.beside[0], bottom + 34, "up", f"D x, added to the read, {of('d_v')}")
    drawing.hook("mixer.hook_gate", at.beside[1], bottom + 34, "up", f"the gate before its SiLU, {of('d_v')}")
    drawing.wire("mixer.hook_v", "skip", "mixer.hook_skip", role="up")
    drawing.wire("mixer.hook_skip", "norm", role="up", enter="right")
    drawing.wire("z", "mixer.hook_gate", role="up")
    drawing.wire("mixer.hook_gate", "norm", role="up", enter="right")
    mlp(drawing, at, end, None)
    return drawing


def rwkv7() -> Drawing:
    """RWKV-7: a decay per channel, an erase along a key of its own, a bonus beside the memory."""
    drawing = Drawing("RWKV-7", ABOUT)
    at = Columns(248, 376, 486, 616, 750, 880, (988, 1092))
    opening(drawing, at, "token shift: every projection reads its own mix of a token and the one before")
    places = {
        "step": (at.decay, "W_w, low rank"),
        "iclr": (366, "W_a, sigmoid"),
        "k": (500, "W_k"),
        "value_gate": (626, "W_ν, sigmoid"),
        "value here": (752, "W_v"),
        "q": (at.query, "W_r"),
        "g": (at.beside[1], "W_g"),
    }
    hooks = {
        "iclr": f"in-context learning rate in (0, 1), {of('d_k')}",
        "k": f"the key before anything is done to it, {of('d_k')}",
        "value_gate": f"how much of layer 0's value; absent in layer 0, {of('d_v')}",
        "q": f"the receptance, {of('d_k')}",
    }
    upstream(drawing, places, hooks)
    mix, mixed, make = UPSTREAM + 64, UPSTREAM + 112, UPSTREAM + 178
    drawing.box("removal", 438, mix, "k ξ / |k ξ|")
    drawing.box("replacement", 592, mix, "k (1 + (iclr - 1) α)")
    drawing.box("v", 752, mix, "mix with v of layer 0")
    drawing.hook("mixer.hook_removal_key", 438, mixed, "up", f"κ, of length 1: erase and probe, {of('d_k')}")
    drawing.hook("mixer.hook_replacement_key", 598, mixed, "up", f"the key of the write and of the bonus, {of('d_k')}")
    drawing.hook("mixer.hook_v", 752, mixed, "up", f"the value of the write and of the bonus, {of('d_v')}")
    drawing.wire("mixer.hook_k", "removal", "mixer.hook_removal_key", role="up")
    drawing.wire("mixer.hook_k", "replacement", "mixer.hook_replacement_key", role="up")
    drawing.wire("mixer.hook_iclr", "replacement", role="up")
    drawing.wire("value here", "v", "mixer.hook_v", role="up")
    drawing.wire("mixer.hook_value_gate", "v", role="up")
    words = {"decay": "-e^{-1/2} sigmoid", "erase": "-κ iclr", "probe": "κ", "key": "k", "value": "v", "query": "r"}
    made(drawing, at, make, words)
    bottom = roles(drawing, at, make + 54, decay=of("d_k"))
    feeds(drawing, "decay", "decay", "step")
    feeds(drawing, "erase", "erase", "mixer.hook_iclr", "mixer.hook_removal_key")
    feeds(drawing, "probe", "erase", "mixer.hook_removal_key")
    feeds(drawing, "key", "write", "mixer.hook_replacement_key")
    feeds(drawing, "value", "write", "mixer.hook_v")
    feeds(drawing, "query", "read", "mixer.hook_q")
    end = closing(drawing, at, bottom, "GroupNorm,\n+ bonus, × gate")
    drawing.box("bonus", at.beside[0], make, "(r · u k) v")
    drawing.hook("mixer.hook_bonus", at.beside[0], bottom + 34, "up", f"added to the normalised read, {of('d_v')}")
    drawing.hook("mixer.hook_gate", at.beside[1], bottom + 34, "up", f"the factor on their sum, {of('d_v')}")
    for source in ("q", "replacement_key", "v"):
        drawing.wire(f"mixer.hook_{source}", "bonus", role="up")
    drawing.wire("bonus", "mixer.hook_bonus", role="up")
    drawing.wire("mixer.hook_bonus", "norm", role="up", enter="right")
    drawing.wire("g", "mixer.hook_gate", role="up")
    drawing.wire("mixer.hook_gate", "norm", role="up", enter="right")
    mlp(drawing, at, end, "channel_mix")
    return drawing


PICTURES = {
    "gated_delta_net": gated_delta_net,
    "mamba2": mamba2,
    "rwkv7": rwkv7,
    "delta_net": delta_net,
    "gated_linear_attention": gated_linear_attention,
    "kimi_delta_attention": kimi_delta_attention,
}
