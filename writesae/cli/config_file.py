"""`--config FILE`: options of a command from a YAML, JSON or TOML file, below what the command line says.

A key is an option's name, "per-atom" or "per_atom". The file becomes the command's default map, so that values go through the
same conversion as words on the line, and a required option may come from it.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

HIDDEN = ("help", "config")


def read_options(ctx: Any, path: Path | None) -> Path | None:
    """Put what a file says below the command line. A callback of `--config`, which is read before the other options.

    Raises `typer.BadParameter` for a file that cannot be read, a key that is no option (with the nearest), and a value
    of the wrong shape.
    """
    if path is None or ctx.resilient_parsing:
        return path
    from writesae.training.plan import read_plan

    try:
        values = read_plan(path)
        ctx.default_map = as_defaults(values, {name: one for one in ctx.command.params for name in names_of(one)})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return path


def names_of(parameter: Any) -> list[str]:
    """How a file may call an option: as on the command line, without the dashes."""
    words = [word.lstrip("-") for word in (*parameter.opts, *parameter.secondary_opts)]
    return [] if parameter.name in HIDDEN else [word.replace("-", "_") for word in words if not word.startswith("no-")]


def as_defaults(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by parameter name, in words as on the line. Raises `ValueError` for unknown keys and values of the wrong shape."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        option = options.get(key.replace("-", "_"))
        if option is None:
            near = get_close_matches(key.replace("-", "_"), options, n=1)
            known = ", ".join(sorted(name.replace("_", "-") for name in options))
            hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else f"the options are {known}"
            raise ValueError(f"this command has no option {key!r}; {hint}")
        many = getattr(option, "multiple", False)
        if isinstance(value, Mapping) or (isinstance(value, list) and not many):
            raise ValueError(f"{key!r} takes one value, got the {type(value).__name__} {value!r}")
        if getattr(option, "is_flag", False):
            if not isinstance(value, bool):
                raise ValueError(f"{key!r} is true or false, got {value!r}")
            found[option.name] = value
        elif value is not None:
            words = [str(one) for one in (value if isinstance(value, list) else [value])]
            found[option.name] = words if many else words[0]
    return found


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Options from a YAML, JSON or TOML file, such as `per-atom: 5`; the command line stands above it.",
        callback=read_options,
        is_eager=True,
        rich_help_panel="Output",
    ),
]
