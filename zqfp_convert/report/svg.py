"""Charts as inline SVG: a few primitives, and logarithmic axes. Colours are the page's own.

Every chart is a `figure` part with a title for those who cannot see it; its numbers are in a table
of the page too. Shades of one colour say how much, and so do tooltips and, where there is room,
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 96.0, 14.0, 44.0  # margins of a chart with axes
ROW = 24.0
LABELS = 210.0  # to the left of bars and cells
ROOM_FOR_NUMBER = 40.0
DARK = 0.55  # opacity from which text on a shade is the light one


@dataclass(frozen=True)
class Line:
    """A series of a chart: its name, values (None where there is none), CSS class, a band."""

    name: str
    values: Sequence[float | None]
    style: str
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


def drawing(height: float, title: str, body: Sequence[str]) -> str:
    """A whole SVG element."""
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    """A line of text."""
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(content)}</text>'


def box(
    x: float, y: float, width: float, height: float, style: str, tip: str = "", shade: float = 1.0
) -> str:
    """A rectangle, with a tooltip."""
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    opacity = "" if shade == 1.0 else f' fill-opacity="{shade:.3f}"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
        f'class="{style}"{opacity}>{inner}</rect>'
    )


def rule(x: float, y: float, to_x: float, to_y: float, style: str = "grid") -> str:
    """A straight line."""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" class="{style}"/>'


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str]], title: str) -> str:
    """Stacked bars on one scale: for each row a label, parts (name, value, CSS class), a total."""
    most = max(sum(value for _, value, _ in parts) for _, parts, _ in rows) or 1.0
    scale = (WIDTH - LABELS / 2 - 150) / most
    body = []
    for index, (label, parts, total) in enumerate(rows):
        x, y = LABELS / 2, 8 + index * 1.6 * ROW
        body.append(text(x - 10, y + 20, label, anchor="end"))
        for name, value, style in parts:
            if value:
                body.append(box(x, y, max(value * scale, 0.5), 1.2 * ROW, style, name))
                x += value * scale
        body.append(text(x + 8, y + 20, total, "strong"))
    return drawing(8 + len(rows) * 1.6 * ROW, title, body)


def cells(
    rows: Sequence[str],
    columns: Sequence[int],
    values: dict[tuple[str, int], float],
    title: str,
) -> str:
    """A table of shades: the stronger, the larger; the scale begins at 0. Values are shares."""
    most = max(values.values(), default=0.0) or 1.0
    width = min((WIDTH - LABELS - 4) / max(1, len(columns)), 64.0)
    numbers = width >= ROOM_FOR_NUMBER
    gap = 1.0 if width > 6 else 0.0
    body = []
    for line, name in enumerate(rows):
        y = line * ROW
        body.append(text(LABELS - 10, y + 17, name, "mono", "end"))
        for place, column in enumerate(columns):
            value = values.get((name, column))
            if value is None:
                continue
            shade, x = 0.05 + 0.95 * value / most, LABELS + place * width
            tip = f"block {column}, {name}: {value:.2%}"
            body.append(box(x, y, width - gap, ROW - gap, "accent", tip, shade))
            if numbers:
                style = "on small" if shade > DARK else "small"
                body.append(text(x + width / 2, y + 16, f"{value:.1%}", style, "middle"))
    bottom = len(rows) * ROW
    step = _step(len(columns), (WIDTH - LABELS) / 34)
    for place, column in enumerate(columns):
        if place % step == 0:
            x = LABELS + (place + 0.5) * width
            body.append(text(x, bottom + 15, str(column), "small muted", "middle"))
    body.append(text(LABELS - 10, bottom + 15, "block", "small muted", "end"))
    y = bottom + 30
    body.append(text(LABELS - 10, y + 12, "0", "small muted", "end"))
    body.append(
        '<defs><linearGradient id="shades"><stop stop-opacity="0.05"/><stop offset="1"/>'
        f'</linearGradient></defs><rect x="{LABELS}" y="{y}" width="144" height="14" '
        'fill="url(#shades)"/>'
    )
    body.append(text(LABELS + 144 + 8, y + 12, f"{most:.2%}", "small muted"))
    return drawing(y + 22, title, body)


def columns(labels: Sequence[str], counts: Sequence[int], title: str, axis: str, what: str) -> str:
    """Columns over labels, each with its number."""
    most, height = max(counts) or 1, 150.0
    width = min((WIDTH - LEFT - 20) / len(labels), 56.0)
    body = [rule(LEFT, TOP + height, LEFT + width * len(labels), TOP + height, "axis")]
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        x, extent = LEFT + place * width, (height - 18) * count / most
        y = TOP + height - extent
        if count:
            body.append(box(x + 2, y, width - 4, extent, "accent", f"{label}: {count:,} {what}"))
            body.append(text(x + width / 2, y - 4, f"{count:,}", "small", "middle"))
        body.append(text(x + width / 2, TOP + height + 15, label, "small muted", "middle"))
    middle = LEFT + width * len(labels) / 2
    body.append(text(middle, TOP + height + 34, axis, "small muted", "middle"))
    return drawing(TOP + height + BOTTOM, title, body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    marks: Sequence[tuple[str, float]],
    title: str,
    axis: str,
) -> str:
    """Shares of counts between edges of a logarithmic axis, and marks on it.

    `counts[i]` lies between edges `i - 1` and `i`; what is below or above all gets a column too.
    """
    filled = [place for place, count in enumerate(counts) if count]
    first, last = min(filled, default=0), max(filled, default=0)
    shown, total = range(first, last + 1), sum(counts) or 1
    width = (WIDTH - LEFT - 20) / len(shown)
    height, most = 190.0, max(counts) / total
    top = TOP + 16 * len(marks)
    body = _levels(most, top, height)
    logs = [math.log10(edge) for edge in edges]
    step = logs[1] - logs[0]

    def at(value: float) -> float:
        inside = math.log10(value) - (logs[0] + (first - 1) * step) if value > 0 else 0.0
        return LEFT + min(max(inside / step, 0), len(shown)) * width

    for place in shown:
        share = counts[place] / total
        x, extent = LEFT + (place - first) * width, height * share / most if most else 0
        low = "" if place == 0 else f"over {edges[place - 1]:.2g} "
        high = "" if place == len(edges) else f"up to {edges[place]:.2g}"
        tip = f"{low}{high}: {share:.2%}"
        body.append(box(x + 0.5, top + height - extent, width - 1, extent, "accent soft", tip))
    body.append(rule(LEFT, top + height, WIDTH - 20, top + height, "axis"))
    for power in range(-9, 4):
        value = 10.0**power
        if logs[0] + (first - 1) * step - 1e-9 <= power <= logs[0] + last * step + 1e-9:
            x = at(value)
            body.append(rule(x, top + height, x, top + height + 5, "axis"))
            body.append(text(x, top + height + 18, _number(value), "small muted", "middle"))
    names = []
    for number, (name, value) in enumerate(marks):
        x, y = at(value), TOP + 16 * number
        body.append(rule(x, y + 2, x, top + height, "mark"))
        right = x < WIDTH * 0.7
        names.append(
            text(x + (5 if right else -5), y + 10, name, "small halo", "start" if right else "end")
        )
    body += names
    body.append(text((LEFT + WIDTH) / 2, top + height + 38, axis, "small muted", "middle"))
    return drawing(top + height + BOTTOM, title, body)


def lines(
    x: Sequence[float], labels: Sequence[str], series: Sequence[Line], title: str, axis: str
) -> str:
    """Lines over a logarithmic axis, logarithmic themselves, named at their right ends."""
    height, right = 250.0, WIDTH - RIGHT
    every = [
        v
        for each in series
        for v in (*each.values, *each.low, *each.high)
        if v is not None and v > 0
    ]
    low, high = _around(every)
    first, last = math.log10(x[0]), math.log10(x[-1])

    def across(value: float) -> float:
        share = (math.log10(value) - first) / (last - first) if last > first else 0.5
        return LEFT + 8 + share * (right - LEFT - 16)

    def up(value: float) -> float:
        share = (math.log10(max(value, low)) - math.log10(low)) / math.log10(high / low)
        return TOP + height * (1 - share)

    body = []
    for value in _ticks(low, high):
        body += [rule(LEFT, up(value), right, up(value))]
        body += [text(LEFT - 8, up(value) + 4, _number(value), "small muted", "end")]
    step = _step(len(x), (right - LEFT) / 70)
    for place, (value, label) in enumerate(zip(x, labels, strict=True)):
        if place % step == 0:
            body.append(text(across(value), TOP + height + 18, label, "small muted", "middle"))
    names = []
    for each in series:
        band = [
            (across(at), up(below), up(above))
            for at, below, above in zip(x, each.low, each.high, strict=False)
            if below is not None and above is not None
        ]
        if len(band) > 1:
            outline = [f"{a:.1f},{b:.1f}" for a, _, b in band]
            outline += [f"{a:.1f},{b:.1f}" for a, b, _ in reversed(band)]
            body.append(f'<polygon points="{" ".join(outline)}" class="band"/>')
        places = [
            (across(at), up(value), label, value)
            for at, value, label in zip(x, each.values, labels, strict=True)
            if value is not None and value > 0
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in places)
        body.append(f'<polyline points="{path}" class="line {each.style}"/>')
        for a, b, label, value in places:
            tip = f"<title>{escape(f'{each.name}, {label}: {value:.4g}')}</title>"
            body.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" class="dot {each.style}">{tip}</circle>'
            )
        if places:
            names.append((places[-1][1], each.name))
    body.append(rule(LEFT, TOP + height, right, TOP + height, "axis"))
    for y, name in _apart(sorted(names), 15):
        body.append(text(right + 4, y + 4, name, "small"))
    body.append(text((LEFT + right) / 2, TOP + height + 38, axis, "small muted", "middle"))
    return drawing(TOP + height + BOTTOM, title, body)


def ranges(
    labels: Sequence[int],
    spreads: Sequence[tuple[float, float, float, float, float]],
    title: str,
    axis: str,
    what: str,
) -> str:
    """For each label least, quarter, middle, three quarters and most, on a logarithmic axis.

    Zeros lie on the axis.
    """
    height, right = 210.0, WIDTH - 20
    low, high = _around([v for each in spreads for v in each if v > 0] or [1.0])
    width = min((right - LEFT) / len(labels), 48.0)

    def up(value: float) -> float:
        share = math.log10(max(value, low) / low) / math.log10(high / low)
        return TOP + height * (1 - share)

    body = []
    for value in _ticks(low, high):
        body += [rule(LEFT, up(value), right, up(value))]
        body += [text(LEFT - 8, up(value) + 4, _number(value), "small muted", "end")]
    step = _step(len(labels), (right - LEFT) / 34)
    for place, (label, spread) in enumerate(zip(labels, spreads, strict=True)):
        least, quarter, mid, three, most = spread
        x, thick = LEFT + (place + 0.5) * width, min(width * 0.6, 22.0)
        told = f"{least:,.0f} to {most:,.0f} {what}, half of them {quarter:,.0f} to {three:,.0f}"
        body.append(rule(x, up(least), x, up(most), "axis"))
        span = max(up(quarter) - up(three), 1.5)
        body.append(
            box(x - thick / 2, up(three), thick, span, "accent soft", f"block {label}: {told}")
        )
        body.append(rule(x - thick / 2, up(mid), x + thick / 2, up(mid), "strong-line"))
        if place % step == 0:
            body.append(text(x, TOP + height + 16, str(label), "small muted", "middle"))
    body.append(rule(LEFT, TOP + height, right, TOP + height, "axis"))
    body.append(text((LEFT + right) / 2, TOP + height + 36, axis, "small muted", "middle"))
    return drawing(TOP + height + BOTTOM, title, body)


def _levels(most: float, top: float, height: float) -> list[str]:
    """Lines of an axis of shares from 0 to `most`."""
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if most / s <= 5), 1.0)
    body = []
    for number in range(int(most / step + 1e-9) + 1):
        y = top + height * (1 - number * step / most) if most else top + height
        body += [rule(LEFT, y, WIDTH - 20, y)]
        body += [text(LEFT - 8, y + 4, f"{number * step:.0%}", "small muted", "end")]
    return body


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis with some room around values."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    return 10 ** (math.log10(low) - 0.1), 10 ** (math.log10(high) + 0.1)


def _ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    leading: tuple[float, ...] = (1.0,)
    if decades <= 3:
        leading = (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    if decades < 0.7:
        leading = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**p for p in powers for m in leading]
    return [value for value in every if low <= value <= high]


def _number(value: float) -> str:
    if value >= 1:
        return f"{value:,.1f}".removesuffix(".0")
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def _step(count: int, fit: float) -> int:
    """Label every so manieth of `count`, where `fit` labels find room."""
    return max(1, math.ceil(count / max(fit, 1)))


def _apart(places: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """Ascending places, moved on where they are closer than that."""
    found: list[tuple[float, str]] = []
    for y, name in places:
        found.append((max(y, found[-1][0] + least) if found else y, name))
    return found
