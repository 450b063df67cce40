"""One self-contained HTML page: headings, tables, plots as inline SVG. No script, no outside file, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camelid.artifact import write_atomic

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 56, 34
COLOURS = ("#c2571a", "#2b6cb0", "#2f855a", "#805ad5")
STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.55 system-ui,"Noto Sans SC",sans-serif;max-width:760px;margin:2.5rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #8884;vertical-align:top}
td.n,th.n{text-align:right}tr.best td{font-weight:600}
pre{background:#8881;padding:.8rem;border-radius:6px;overflow-x:auto;font-size:.85rem;white-space:pre-wrap}
svg{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}p.note{color:#888;font-size:.9rem}
"""


@dataclass(frozen=True)
class Curve:
    """A named line of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Page:
    """Collects sections, then writes them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, note: bool = False) -> None:
        self.parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def pre(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], best: int | None = None) -> None:
        """Rows of text and numbers (right-aligned); row `best` is set in bold."""
        numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

        def line(cells: Sequence[object], tag: str, row_class: str = "") -> str:
            inner = "".join(
                f"<{tag}{' class=n' if number else ''}>{html.escape(_shown(cell))}</{tag}>"
                for cell, number in zip(cells, numeric, strict=True)
            )
            return f"<tr{row_class}>{inner}</tr>"

        body = "".join(line(row, "td", " class=best" if i == best else "") for i, row in enumerate(rows))
        self.parts.append(f"<table>{line(header, 'th')}{body}</table>")

    def plot(self, title: str, curves: Sequence[Curve], x: str) -> None:
        """Lines over a shared x axis. Points that are not finite are left out."""
        self.heading(title)
        self.parts.append(_svg(curves, x))

    def write(self, path: Path) -> None:
        head = (
            f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self.title)}'
        )
        page = f"<!doctype html><html lang=en><head>{head}</title><style>{STYLE}</style></head><body>"
        write_atomic(path, page + "\n".join(self.parts) + "</body></html>\n")


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) >= 10 else f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _svg(curves: Sequence[Curve], x_name: str) -> str:
    points = [(x, y) for c in curves for x, y in zip(c.x, c.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return "<p class=note>too few points for a plot</p>"
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + across * (WIDTH - LEFT - 12), (HEIGHT - BOTTOM) - up * (HEIGHT - BOTTOM - 24)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for i in range(5):
        value = y_low + (y_high - y_low) * i / 4
        _, at = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{at:.1f}" y2="{at:.1f}" stroke="#8883"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        across = x_low + (x_high - x_low) * i / 4
        at, _ = place(across, y_low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{across:,.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 1}" text-anchor="middle">{html.escape(x_name)}</text>')
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = [place(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(
            f'<text x="{LEFT + 10 + 150 * number}" y="14" style="fill:{colour}">{html.escape(curve.name)}</text>'
        )
    return "".join([*parts, "</svg>"])
