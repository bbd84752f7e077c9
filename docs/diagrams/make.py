"""Write the pictures of the blocks beside this file: python -m docs.diagrams.make"""

from pathlib import Path

from docs.diagrams.forks import forks
from docs.diagrams.rules import PICTURES

HERE = Path(__file__).parent


def pictures() -> dict[str, str]:
    """Name -> SVG."""
    return {name: draw().svg() for name, draw in PICTURES.items()} | {"forks": forks()}


def main() -> None:
    """One file per picture."""
    for name, svg in pictures().items():
        (HERE / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
