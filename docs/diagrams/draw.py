"""Drawing with boxes, hook pills and wires: a small vocabulary that gives one SVG which follows light and dark mode.

A hook is named as in `model.hook_dict` behind `blocks.{l}.`, so that a test can hold every picture against the model. Colours
are roles of the recurrence and the same in every picture.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from html import escape

MONO, SANS = 7.0, 6.2
"""Width of a letter in user units: of hook names (11.2 px, monospace) and of boxes (11.5 px)."""
PILL_HEIGHT, LINE = 22, 14

STYLE = """
.hookmap { --ink: #1d2433; --dim: #5d6678; --line: #9aa3b5; --panel: #f4f6fa; --box: #ffffff;
  --decay: #b86e00; --erase: #c8324f; --write: #17803d; --read: #1c66d6; --up: #7a4fd0; --stream: #4a5568;
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { .hookmap { DARK } }
[data-md-color-scheme="default"] .hookmap { LIGHT }
[data-md-color-scheme="slate"] .hookmap { DARK }
.hookmap text { fill: var(--ink); font-size: 11.5px; text-anchor: middle; }
.hookmap .dim { fill: var(--dim); font-size: 10.5px; }
.hookmap .left { text-anchor: start; } .hookmap .end { text-anchor: end; }
.hookmap .title { font-size: 15px; font-weight: 600; text-anchor: start; }
.hookmap .panel { fill: var(--panel); stroke: var(--line); stroke-opacity: 0.6; }
.hookmap .box { fill: var(--box); stroke: var(--line); }
.hookmap .memory { fill: var(--box); stroke: var(--dim); stroke-width: 1.6; }
.hookmap .term { fill: var(--c); fill-opacity: 0.16; stroke: none; }
.hookmap .formula { font-size: 14.5px; font-family: "STIX Two Text", "Cambria Math", Georgia, "DejaVu Serif", serif; }
.hookmap .under { fill: var(--box); }
.hookmap .pill { fill: var(--c); fill-opacity: 0.15; stroke: var(--c); stroke-width: 1.3; }
.hookmap .lazy { stroke-dasharray: 4 3; }
.hookmap .name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11.2px;
  font-weight: 600; }
.hookmap .wire { fill: none; stroke: var(--c); stroke-width: 1.5; }
.hookmap .decay { --c: var(--decay); } .hookmap .erase { --c: var(--erase); } .hookmap .write { --c: var(--write); }
.hookmap .read { --c: var(--read); } .hookmap .up { --c: var(--up); } .hookmap .stream { --c: var(--stream); }
.hookmap .plain { --c: var(--line); }
"""
LIGHT = STYLE[STYLE.index("--ink") : STYLE.index("font-family")].strip()
DARK = (
    "--ink: #e8ebf2; --dim: #a3acbd; --line: #6b7488; --panel: #1c212b; --box: #262c38; --decay: #f0ab3c; --erase: #ff7b93; "
    "--write: #55c97c; --read: #6ea8ff; --up: #b394ff; --stream: #a9b4c6;"
)
PLAIN_STYLE = STYLE.replace("LIGHT", LIGHT).replace("DARK", DARK).strip()


@dataclass(frozen=True)
class Node:
    """A box or a pill by its centre."""

    x: float
    y: float
    text: str
    role: str = "plain"
    hook: bool = False
    lazy: bool = False
    about: str = ""
    """Shown when the pointer rests on it."""

    @property
    def label(self) -> str:
        """What is written on it; a hook goes by its last name."""
        return self.text.rsplit(".", 1)[-1] if self.hook else self.text

    @property
    def width(self) -> float:
        """Wide enough for the longest line."""
        longest = max(len(re.sub(r"[_^{}]", "", line)) for line in self.label.split("\n"))
        return longest * (MONO if self.hook else SANS) + 18

    @property
    def height(self) -> float:
        """High enough for all lines."""
        return PILL_HEIGHT if self.hook else LINE * len(self.label.split("\n")) + 10

    def port(self, side: str, shift: float = 0.0) -> tuple[float, float]:
        """A point on a side, `shift` away from its middle."""
        half = (self.width / 2, self.height / 2)
        across = {"left": -1, "right": 1}.get(side, 0)
        down = {"top": -1, "bottom": 1}.get(side, 0)
        return self.x + across * half[0] + (shift if down else 0), self.y + down * half[1] + (shift if across else 0)


@dataclass(frozen=True)
class Wire:
    """A curve from a side of one node to a side of another, with an arrow unless `arrow` is off."""

    source: str
    target: str
    role: str = "plain"
    leave: str = "bottom"
    enter: str = "top"
    arrow: bool = True


@dataclass
class Drawing:
    """Nodes by name, wires between them, and whatever else is drawn under them."""

    title: str
    about: str
    nodes: dict[str, Node] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)
    under: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)
    width: float = 980
    height: float = 700

    def box(self, name: str, x: float, y: float, text: str) -> None:
        """What is computed there."""
        self.nodes[name] = Node(x, y, text)

    def hook(self, name: str, x: float, y: float, role: str, about: str, *, lazy: bool = False) -> None:
        """A hook point; it is its own name, `mixer.hook_q`."""
        self.nodes[name] = Node(x, y, name, role, True, lazy, about)

    def wire(
        self, *names: str, role: str = "plain", leave: str = "bottom", enter: str = "top", arrow: bool = True
    ) -> None:
        """A chain of wires through these nodes."""
        self.wires += [Wire(a, b, role, leave, enter, arrow) for a, b in zip(names, names[1:], strict=False)]

    def hooks(self) -> list[str]:
        """Names of all hook points that are drawn."""
        return [node.text for node in self.nodes.values() if node.hook]

    def svg(self) -> str:
        """The whole picture."""
        arrows = "".join(
            f'<marker id="{self.key}-{role}" class="{role}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="6.5" '
            f'markerHeight="6.5" orient="auto"><path d="M0.5 0.8 L7 4 L0.5 7.2 Z" fill="var(--c)"/></marker>'
            for role in ("plain", "decay", "erase", "write", "read", "up", "stream")
        )
        parts = [*self.under, *self._wires(), *map(_node, self.nodes.values()), *self.over]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="hookmap" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(self.title)}">\n<title>{escape(self.about)}</title>\n'
            f"<style>{PLAIN_STYLE}</style>\n<defs>{arrows}</defs>\n" + "\n".join(parts) + "\n</svg>\n"
        )

    @property
    def key(self) -> str:
        """A name for the arrows that no other picture on the same page has."""
        return re.sub(r"\W+", "-", self.title.lower())

    def _wires(self) -> list[str]:
        """Every wire; those that share a side of a node are spread over it in the order in which they come and go."""
        shifts: dict[tuple[int, str], float] = {}
        ends = defaultdict(list)
        for index, wire in enumerate(self.wires):
            ends[wire.source, wire.leave].append((index, "source", self.nodes[wire.target]))
            ends[wire.target, wire.enter].append((index, "target", self.nodes[wire.source]))
        for (name, side), meeting in ends.items():
            upright = side in ("top", "bottom")
            meeting.sort(key=lambda end: end[2].x if upright else end[2].y)
            room = (self.nodes[name].width if upright else self.nodes[name].height) - 16
            step = min(16.0, room / max(len(meeting) - 1, 1))
            for place, (index, end, _) in enumerate(meeting):
                shifts[index, end] = (place - (len(meeting) - 1) / 2) * step
        lines = []
        for index, wire in enumerate(self.wires):
            a = self.nodes[wire.source].port(wire.leave, shifts[index, "source"])
            b = self.nodes[wire.target].port(wire.enter, shifts[index, "target"])
            lines.append(self.path(_curve(a, wire.leave, b, wire.enter), wire.role, wire.arrow))
        return lines

    def path(self, d: str, role: str, arrow: bool = True) -> str:
        """A line of its own."""
        end = f' marker-end="url(#{self.key}-{role})"' if arrow else ""
        return f'<path class="wire {role}" d="{d}"{end}/>'


def _curve(a: tuple[float, float], leave: str, b: tuple[float, float], enter: str) -> str:
    """A Bezier curve that leaves and enters square to the sides."""
    across, down = max(abs(b[0] - a[0]), 24), max(abs(b[1] - a[1]), 24)
    turns = (leave in ("top", "bottom")) != (enter in ("top", "bottom"))
    step = {"top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0)}
    ends = []
    for (x, y), side in ((a, leave), (b, enter)):
        reach = (0.92 if turns else 0.45) * (down if side in ("top", "bottom") else across)
        ends.append((x + reach * step[side][0], y + reach * step[side][1]))
    first, second = ends
    return "M{:.1f} {:.1f} C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*a, *first, *second, *b)


def _node(node: Node) -> str:
    x, y, width, height = node.x - node.width / 2, node.y - node.height / 2, node.width, node.height
    frame = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    if node.hook:
        word = node.label.removeprefix("hook_")
        name = f'<tspan fill="var(--dim)" font-weight="400">hook_</tspan>{escape(word)}'
        lazy = " lazy" if node.lazy else ""
        return (
            f'<g class="{node.role}"><title>{escape(node.text)}: {escape(node.about)}</title><rect class="under" {frame} '
            f'rx="11"/><rect class="pill{lazy}" {frame} rx="11"/>{text(node.x, node.y + 3.8, name, "name", raw=True)}</g>'
        )
    lines = node.label.split("\n")
    top = node.y + 4 - LINE * (len(lines) - 1) / 2
    written = "".join(text(node.x, top + LINE * index, line) for index, line in enumerate(lines))
    return f'<g><rect class="box" {frame} rx="4"/>{written}</g>'


def text(x: float, y: float, words: str, kind: str = "", *, raw: bool = False) -> str:
    """A line of text; `_t` or `_{t-1}` is set low and `^T` high."""
    if not raw:
        words = re.sub(r"([_^])(?:\{(.+?)\}|(\w))", _raised, escape(words))
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{words}</text>'


def _raised(found: re.Match) -> str:
    up, words = found[1] == "^", found[2] or found[3]
    away, back = (-4.5, 4.5) if up else (3.2, -3.2)
    return f'<tspan dy="{away}" font-size="74%">{words}</tspan><tspan dy="{back}">&#8203;</tspan>'
