"""For the API pages: `layer, head: the cell.` in a docstring documents two parameters, each with its own annotation."""

import re
from typing import Any

import griffe

GROUP = re.compile(r"^(\s*)([\w*]+(?:, [\w*]+)+): (.*)$")


class GroupedParameters(griffe.Extension):
    """Writes an entry of several parameters out as one entry each, before docstrings are parsed."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called for every function as it is read."""
        if func.docstring is not None:
            func.docstring.value = apart(func.docstring.value, {parameter.name for parameter in func.parameters})


def apart(docstring: str, parameters: set[str]) -> str:
    """The docstring with every group of known parameters written out; whatever follows an entry is repeated with it."""
    lines, result = docstring.splitlines(), []
    for index, line in enumerate(lines):
        group = GROUP.match(line)
        names = group[2].split(", ") if group else []
        if not group or not {name.lstrip("*") for name in names} <= parameters:
            result.append(line)
            continue
        more = []
        for later in lines[index + 1 :]:
            if len(later) - len(later.lstrip()) <= len(group[1]) or not later.strip():
                break
            more.append(later)
        for name in names[:-1]:
            result += [f"{group[1]}{name}: {group[3]}", *more]
        result.append(f"{group[1]}{names[-1]}: {group[3]}")
    return "\n".join(result)
