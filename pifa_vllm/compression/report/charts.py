"""Geometry of the report's charts; the templates draw them as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass

# One panel is about as wide as a phone, so that its text is never scaled down to be unreadable.
WIDTH, HEIGHT = 340.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 36.0, 44.0, 10.0, 36.0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in pixels and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Point:
    """A data point in pixels, with the text that hovering over it shows."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """One series of a line chart; `label_y` is where its name stands, clear of the other names."""

    name: str
    points: list[Point]
    path: str
    label_y: float


@dataclass(frozen=True)
class LineChart:
    """Series over the decoder layers, with the y axis from 0."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


@dataclass(frozen=True)
class Column:
    """One column of a column chart in pixels, with the text that hovering over it shows."""

    x: float
    y: float
    width: float
    height: float
    title: str


def axis_steps(highest: float, count: int = 4) -> list[float]:
    """Return about `count` round values from 0 that reach up to `highest` or just beyond."""
    if highest < 1e-300:  # whose steps would underflow
        return [0.0, 1.0]
    raw = highest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def line_chart(series: dict[str, list[tuple[int, float]]], highest: float | None = None) -> LineChart:
    """Lay out series of (layer, value) points.

    Args:
        series: name to points, all values 0 or more, layers ascending.
        highest: top of the y axis, so that several charts can share it; None takes the data's.
    """
    layers = [layer for points in series.values() for layer, _ in points]
    first, last = (min(layers), max(layers)) if layers else (0, 0)
    steps = axis_steps(
        highest if highest is not None else max((v for p in series.values() for _, v in p), default=0)
    )

    def x_of(layer: float) -> float:
        share = (layer - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / steps[-1] * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for name, points in series.items():
        dots = [Point(x_of(i), y_of(v), f"{name}, layer {i}: {v:.4f}") for i, v in points]
        path = "M" + " L".join(f"{dot.x} {dot.y}" for dot in dots) if dots else ""
        lines.append(Line(name, dots, path, dots[-1].y if dots else 0.0))
    return LineChart(
        x_ticks=[Tick(x_of(i), str(i)) for i in _layer_ticks(first, last)],
        y_ticks=[Tick(y_of(v), f"{v:g}") for v in steps],
        lines=_spread_labels(lines),
    )


def rank_columns(ranks: list[tuple[int, int, float]], full: int, width: float, height: float) -> list[Column]:
    """Lay out one kind's (layer, rank, density) as columns, `height` standing for the full rank."""
    pitch = width / max(1, len(ranks))
    return [
        Column(
            x=round(i * pitch, 2),
            y=round(height * (1 - rank / full), 2),
            width=round(max(pitch - min(1.0, pitch / 4), 0.5), 2),
            height=round(height * rank / full, 2),
            title=f"layer {layer}: rank {rank} of {full}, density {density:.3f}",
        )
        for i, (layer, rank, density) in enumerate(ranks)
    ]


def _layer_ticks(first: int, last: int) -> list[int]:
    step = max(1, round(axis_steps(float(max(last - first, 1)), 6)[1]))
    ticks = list(range(first, last + 1, step))
    # The last layer is always labelled, unless a label just before it leaves no room.
    if last - ticks[-1] > step / 2:
        ticks.append(last)
    return ticks


def _spread_labels(lines: list[Line], gap: float = 13.0) -> list[Line]:
    """Push the names at the lines' ends apart until they are `gap` pixels from one another."""
    order = sorted(range(len(lines)), key=lambda i: lines[i].label_y)
    places = [lines[i].label_y for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    # Names that were pushed below the axis move up again, and push those above them.
    limit = HEIGHT - BOTTOM
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    placed = dict(zip(order, places, strict=True))
    return [Line(x.name, x.points, x.path, round(placed[i], 1)) for i, x in enumerate(lines)]
