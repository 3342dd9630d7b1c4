"""Draw the layers of pyproject.toml as docs/layers.svg: `python docs/draw_layers.py`."""

import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
BOX_HEIGHT, GAP, MARGIN, CHARACTER, PADDING, WIDTH = 30, 12, 16, 8, 14, 760
COLOURS = ("#e8eaf6", "#c5cae9")


def read_layers() -> list[list[str]]:
    """Rows of package names, the lowest first."""
    content = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return content["tool"]["pal_ds"]["layers"]


def draw(layers: list[list[str]]) -> str:
    """The picture as SVG, the highest layer on top; the same layers give the same text."""
    height = 2 * MARGIN + len(layers) * (BOX_HEIGHT + GAP) - GAP + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="monospace" font-size="13">',
        "<title>The packages of pal_ds in layers</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    y = MARGIN
    for number, names in enumerate(reversed(layers)):
        parts += _row(names, y, COLOURS[number % 2])
        y += BOX_HEIGHT + GAP
    text = "each package imports only from the rows below its own"
    parts.append(f'<text x="{WIDTH // 2}" y="{y + 10}" text-anchor="middle">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(names: list[str], y: int, colour: str) -> list[str]:
    widths = [len(name) * CHARACTER + 2 * PADDING for name in names]
    x = (WIDTH - sum(widths) - GAP * (len(names) - 1)) // 2
    parts = []
    for name, width in zip(names, widths, strict=True):
        parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="4" fill="{colour}" '
            'stroke="#3949ab"/>'
        )
        middle = x + width // 2
        parts.append(f'<text x="{middle}" y="{y + 20}" text-anchor="middle">{name}</text>')
        x += width + GAP
    return parts


if __name__ == "__main__":
    (DOCS / "layers.svg").write_text(draw(read_layers()), encoding="utf-8")
