"""One self-contained HTML page: headings, tables, plots as inline SVG that a drag enlarges. No outside file, light and
dark; without scripts everything is there but the enlarging."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from camelid.disk import write_atomic

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 260, 56, 34
COLOURS = ("#c2571a", "#2b6cb0", "#2f855a", "#805ad5")
HEATS = 8
TINTS = ("#e8590c", "#1c7ed6", "#2f9e44", "#9c36b5", "#f08c00")
STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.55 system-ui,"Noto Sans SC",sans-serif;max-width:760px;margin:2.5rem auto;padding:0 1rem}
p{overflow-wrap:anywhere}h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid #8884;vertical-align:top}
td.n,th.n{text-align:right}tr.best td{font-weight:600}
pre{background:#8881;padding:.8rem;border-radius:6px;overflow-x:auto;font-size:.85rem;white-space:pre-wrap}
td.bar{width:60%}td.bar div{background:#2b6cb0;height:.8rem;border-radius:2px;min-width:1px}
svg[role]{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}
svg[data-x]{cursor:crosshair;touch-action:pan-y;user-select:none}rect.band{fill:#2b6cb033}
polyline{vector-effect:non-scaling-stroke}p.note{color:#888;font-size:.9rem}
"""
STYLE += "".join(f"span.t{i}{{background:{tint}44}}" for i, tint in enumerate(TINTS))
STYLE += "".join(f"span.h{i}{{background:rgba(224,49,49,{i / 9:.2f})}}" for i in range(HEATS))

# Drag over a plot: its lines fill the width with that stretch, and the scale below follows. Double-click: all of it.
ZOOM = """
document.querySelectorAll("svg[data-x]").forEach(svg => {
  const [left, right, low, high] = svg.dataset.x.split(" ").map(Number), lines = svg.querySelector("g.lines")
  const marks = [...svg.querySelectorAll("text.x")], band = svg.querySelector("rect.band")
  let from = low, to = high, start = null
  const at = e => Math.min(right, Math.max(left, (e.clientX - svg.getBoundingClientRect().left)
    * svg.viewBox.baseVal.width / svg.getBoundingClientRect().width))
  const value = x => from + (x - left) / (right - left) * (to - from)
  const show = (a, b) => {
    from = a; to = b
    const k = (high - low) / (b - a)
    const edge = left + (a - low) / (high - low) * (right - left)
    lines.setAttribute("transform", `translate(${left - k * edge} 0) scale(${k} 1)`)
    marks.forEach((m, i) => m.textContent = Math.round(a + (b - a) * i / (marks.length - 1)).toLocaleString("en"))
  }
  svg.onpointerdown = e => { start = at(e); e.preventDefault() }
  svg.onpointermove = e => { if (start !== null) {
    band.setAttribute("x", Math.min(start, at(e))); band.setAttribute("width", Math.abs(at(e) - start)) } }
  window.addEventListener("pointerup", e => { if (start === null) return
    const [a, b] = [start, at(e)].sort((p, q) => p - q); start = null; band.setAttribute("width", 0)
    if (b - a > 8) show(value(a), value(b)) })
  svg.ondblclick = () => show(low, high)
})
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

    def spans(self, text: str, spans: Sequence[tuple[int, int, str]]) -> None:
        """A text with its stretches (start, end, label) in changing colours; the label shows under the pointer."""
        out, at = [], 0
        for number, (start, end, label) in enumerate(spans):
            inner = html.escape(text[start:end]).replace("\n", "↵\n")
            out.append(html.escape(text[at:start]))
            out.append(f'<span class="t{number % len(TINTS)}" title="{html.escape(label)}">{inner}</span>')
            at = end
        self.parts.append(f"<pre>{''.join(out)}{html.escape(text[at:])}</pre>")

    def heat(self, text: str, spans: Sequence[tuple[int, int, float, str]]) -> None:
        """A text with its stretches (start, end, heat, label) the redder the nearer their heat is to 1; the label shows
        under the pointer."""
        out, at = [], 0
        for start, end, heat, label in spans:
            inner = html.escape(text[start:end]).replace("\n", "↵\n")
            level = min(HEATS - 1, max(0, int(heat * HEATS)))
            out.append(
                f'{html.escape(text[at:start])}<span class="h{level}" title="{html.escape(label)}">{inner}</span>'
            )
            at = max(at, end)
        self.parts.append(f"<pre>{''.join(out)}{html.escape(text[at:])}</pre>")

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

    def bars(self, title: str, rows: Sequence[tuple[str, int]]) -> None:
        """Horizontal bars, one a row, with their numbers; nothing for no rows."""
        if not rows:
            return
        self.heading(title)
        most = max(n for _, n in rows) or 1
        line = '<tr><td>{}</td><td class=bar><div style="width:{:.1f}%"></div></td><td class=n>{:,}</td></tr>'
        body = "".join(line.format(html.escape(name), 100 * n / most, n) for name, n in rows)
        self.parts.append(f"<table>{body}</table>")

    def flow(self, title: str, total: int, parts: Sequence[tuple[str, int]]) -> None:
        """How a total divides: one band from the left fans out into its parts, each as wide as its share."""
        self.heading(title)
        self.parts.append(_flow_svg(total, [p for p in parts if p[1] > 0]))

    def plot(self, title: str, curves: Sequence[Curve], x: str) -> None:
        """Lines over a shared x axis. Points that are not finite are left out."""
        self.heading(title)
        self.parts.append(_svg(curves, x))

    def write(self, path: Path) -> None:
        write_atomic(path, self.html())

    def html(self) -> str:
        """The whole page."""
        head = (
            f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(self.title)}'
        )
        page = f"<!doctype html><html lang=en><head>{head}</title><style>{STYLE}</style></head><body>"
        script = f"<script>{ZOOM}</script>" if any("data-x=" in part for part in self.parts) else ""
        return page + "\n".join(self.parts) + script + "</body></html>\n"

    def _repr_html_(self) -> str:
        """In a notebook: a frame of its own, so that neither's style reaches the other; as high as what is in it."""
        fit = "this.style.height=this.contentWindow.document.documentElement.scrollHeight+'px'"
        whole = html.escape(self.html(), quote=True)
        return f'<iframe srcdoc="{whole}" style="width:100%;border:0" onload="{fit}"></iframe>'


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) >= 10 else f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _flow_svg(total: int, parts: Sequence[tuple[str, int]]) -> str:
    if not total or not parts:
        return "<p class=note>nothing was read</p>"
    band, gap = 180.0, 22.0
    height = band + gap * len(parts) + 10
    out = [f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">']
    left = right = 4.0
    for number, (name, amount) in enumerate(parts):
        size = max(1.0, band * amount / total)
        colour = "#2f855a" if number == 0 else COLOURS[0] if number % 2 else COLOURS[1]
        curve = (
            f"M90 {left:.1f} C250 {left:.1f} 250 {right:.1f} 400 {right:.1f} V{right + size:.1f} "
            f"C250 {right + size:.1f} 250 {left + size:.1f} 90 {left + size:.1f} Z"
        )
        out.append(f'<path d="{curve}" fill="{colour}" opacity=".65"/>')
        label = f"{name}: {amount:,} ({amount / total:.1%})"
        out.append(f'<text x="408" y="{right + size / 2 + 4:.1f}">{html.escape(label)}</text>')
        left, right = left + band * amount / total, right + size + gap
    out.append(f'<text x="4" y="{4 + band / 2:.0f}">{total:,}</text>')
    return "".join([*out, "</svg>"])


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

    inside = f"{LEFT} {WIDTH - 12} {x_low} {x_high}"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-x="{inside}">']
    for i in range(5):
        value = y_low + (y_high - y_low) * i / 4
        _, at = place(x_low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{at:.1f}" y2="{at:.1f}" stroke="#8883"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        across = x_low + (x_high - x_low) * i / 4
        at, _ = place(across, y_low)
        parts.append(f'<text class=x x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{across:,.0f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 1}" text-anchor="middle">{html.escape(x_name)}</text>')
    lines: list[str] = []
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = [place(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(
            f'<text x="{LEFT + 10 + 150 * number}" y="14" style="fill:{colour}">{html.escape(curve.name)}</text>'
        )
    # An inner svg, so that what is enlarged past the axes is cut off there.
    across = WIDTH - 12 - LEFT
    frame = f'<svg x="{LEFT}" width="{across}" height="{HEIGHT}" viewBox="{LEFT} 0 {across} {HEIGHT}">'
    band = f'<rect class=band y="20" height="{HEIGHT - BOTTOM - 20}" width="0"/>'
    return "".join([*parts, frame, "<g class=lines>", *lines, "</g></svg>", band, "</svg>"])
