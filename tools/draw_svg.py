"""A picture as SVG text: boxes, words and arrows. Knows nothing about models.

Colours are classes, so that a picture follows the reader's light or dark scheme, with a card of its own colour
behind it: it is readable on any page.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

# class: (light, dark). What lies in a coloured cell is dark in both, so these colours are the same in both.
COLOURS = {
    "card": ("#ffffff", "#1e2129"),
    "ink": ("#24292f", "#e6e8ec"),
    "soft": ("#5c6370", "#a3a9b5"),
    "empty": ("#efede6", "#333843"),
    "box": ("#f6f4ee", "#2a2f3a"),
    "new": ("#f2a541", "#f2a541"),
    "old": ("#8db4d6", "#8db4d6"),
    "third": ("#a5cf9b", "#a5cf9b"),
    "fourth": ("#d6b3dc", "#d6b3dc"),
    "on": ("#1b1f24", "#1b1f24"),
}
FONT = "font-family:Helvetica,Arial,'DejaVu Sans',sans-serif"
INK_ON = {"new", "old", "third", "fourth"}


def _style() -> str:
    """Rules for fills, for strokes (class s-NAME), and for a dark scheme."""
    light, dark = (
        "".join(f".{name}{{fill:{pair[i]}}}.s-{name}{{stroke:{pair[i]};fill:none}}" for name, pair in COLOURS.items())
        for i in (0, 1)
    )
    return f"<style>text{{{FONT}}}{light}@media(prefers-color-scheme:dark){{{dark}}}</style>"


def _number(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


class Picture:
    """An SVG of width x height pixels, drawn in order; `title` is for those who cannot see it."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def rect(self, x: float, y: float, w: float, h: float, kind: str, label: str = "", size: float = 11) -> None:
        """A filled box with a word in its middle."""
        at = f'x="{_number(x)}" y="{_number(y)}" width="{_number(w)}" height="{_number(h)}"'
        self.parts.append(f'<rect {at} rx="2" class="{kind}"/>')
        if label:
            self.text(x + w / 2, y + h / 2, label, "on" if kind in INK_ON else "ink", size)

    def frame(self, x: float, y: float, w: float, h: float, kind: str = "soft") -> None:
        """An outlined box."""
        at = f'x="{_number(x)}" y="{_number(y)}" width="{_number(w)}" height="{_number(h)}"'
        self.parts.append(f'<rect {at} rx="5" class="s-{kind}" stroke-width="1.3"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        kind: str = "ink",
        size: float = 12,
        anchor: str = "middle",
        turn: float = 0,
    ) -> None:
        """Words centred on y; `anchor` is start, middle or end; `turn` is in degrees."""
        turned = f' transform="rotate({_number(turn)} {_number(x)} {_number(y)})"' if turn else ""
        self.parts.append(
            f'<text x="{_number(x)}" y="{_number(y + 0.35 * size)}" font-size="{_number(size)}" '
            f'text-anchor="{anchor}" class="{kind}"{turned}>{escape(words)}</text>'
        )

    def line(self, *points: tuple[float, float], kind: str = "soft", width: float = 1.5, head: bool = False) -> None:
        """A line through points, with an arrow's head at its end."""
        path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="s-{kind}" stroke-width="{_number(width)}"/>')
        if head:
            (x0, y0), (x1, y1) = points[-2:]
            angle = math.atan2(y1 - y0, x1 - x0)
            back = [(x1 - 8 * math.cos(angle + a), y1 - 8 * math.sin(angle + a)) for a in (0.45, -0.45)]
            tip = " ".join(f"{_number(x)},{_number(y)}" for x, y in [(x1, y1), *back])
            self.parts.append(f'<polygon points="{tip}" class="{kind}"/>')

    def circle(self, x: float, y: float, r: float, kind: str, filled: bool = False) -> None:
        """A circle, outlined or filled."""
        name = kind if filled else f"s-{kind}"
        self.parts.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(r)}" class="{name}"/>')

    def __str__(self) -> str:
        w, h = _number(self.width), _number(self.height)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">'
        card = f'<rect width="{w}" height="{h}" rx="8" class="card"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", _style(), card, *self.parts, "</svg>", ""])

    def save(self, path: Path) -> None:
        """Write the SVG."""
        path.write_text(str(self), encoding="utf-8")
