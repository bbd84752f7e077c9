"""Write the pictures of the blocks beside this file: python -m docs.diagrams.make"""

from pathlib import Path

from docs.diagrams.rules import PICTURES

HERE = Path(__file__).parent


def main() -> None:
    """One SVG per picture."""
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
