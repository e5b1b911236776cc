"""Drawings of lines, boxes and texts: as SVG for the page, and as pixels for TensorBoard."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito, "Color Universal Design", 2008: colour-blind people can tell them apart.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
INK, FAINT = "#222222", "#99999955"
FONT_SIZE, LINE_HEIGHT = 12, 17
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 52, 440, 10, 290  # of a chart, and of its axes
FINER = 2  # pixels are drawn this much finer, so that lines are smooth


class Drawing:
    """Lines, boxes and texts on an area of ``width`` x ``height`` pixels; positions are from the top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._fine = Image.new("RGB", (width * FINER, height * FINER), "white")
        self._pen = ImageDraw.Draw(self._fine, "RGBA")  # blends colours that are transparent
        self._elements: list[Markup] = []
        self._texts: list[tuple[Image.Image, tuple[int, int], str]] = []  # masks, places and colours

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        """A line through points."""
        self._pen.line([(x * FINER, y * FINER) for x, y in points], colour, max(1, round(width * FINER)), "curve")
        form = '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}"/>'
        self._elements.append(Markup(form).format(" ".join(f"{x:.1f},{y:.1f}" for x, y in points), colour, width))

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled box."""
        self._pen.rectangle([round(end * FINER) for end in (x, y, x + width, y + height)], colour)
        form = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>'
        self._elements.append(Markup(form).format(x, y, width, height, colour))

    def text(
        self, x: float, y: float, text: str, anchor: str = "middle", turned: bool = False, colour: str = INK
    ) -> None:
        """A text with its start, middle or end at a position; a turned one is read from below."""
        length = math.ceil(_font().getlength(text))
        mask = Image.new("L", (length, LINE_HEIGHT))
        ImageDraw.Draw(mask).text((0, LINE_HEIGHT / 2), text, 255, _font(), "lm")
        before = {"start": 0, "middle": length / 2, "end": length}[anchor]
        place = (x - LINE_HEIGHT / 2, y - length + before) if turned else (x - before, y - LINE_HEIGHT / 2)
        mask = mask.rotate(90, expand=True) if turned else mask
        self._texts.append((mask, (round(place[0]), round(place[1])), colour))
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        form = f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}"{turn}>{{}}</text>'  # in the page's colour
        self._elements.append(Markup(form).format(text))

    def svg(self, about: str = "") -> Markup:
        """The drawing as an inline SVG element, with a text for those who cannot see it."""
        form = '<svg class="drawing" role="img" aria-label="{}" viewBox="0 0 {} {}" style="max-width:{}px">{}</svg>'
        return Markup(form).format(about, self.width, self.height, self.width, Markup("").join(self._elements))

    def image(self) -> Image.Image:
        """The drawing as pixels; texts lie above the rest."""
        image = self._fine.reduce(FINER)
        for mask, place, colour in self._texts:
            image.paste(colour, place, mask)
        return image

    def pixels(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The drawing as pixels, [H, W, 3]."""
        return np.asarray(self.image())


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    points: Sequence[tuple[float, float]]
    colour: str = GREY
    name: str = ""  # in the legend; empty: not there
    width: float = 2.0
    dots: bool = False  # whether to mark each point


def chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    y_range: tuple[float, float] = (0, 1),
    x_ticks: Sequence[float] = (),
    log: bool = False,
) -> Drawing:
    """A chart of lines, with the legend below.

    The ends of ``x_ticks``, 0 and 1 without, are those of the x axis, which is logarithmic with ``log``.
    """
    named = [line for line in series if line.name]
    drawing = Drawing(WIDTH, BOTTOM + 48 + LINE_HEIGHT * len(named))
    x_ticks, (low, high) = x_ticks or ticks(0, 1), y_range
    across = math.log10 if log else float
    first, last = across(x_ticks[0]), across(x_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        share = (across(x) - first) / ((last - first) or 1), (y - low) / ((high - low) or 1)
        return LEFT + share[0] * (RIGHT - LEFT), BOTTOM - share[1] * (BOTTOM - TOP)

    for tick in ticks(low, high):
        at = place(x_ticks[0], tick)[1]
        drawing.line([(LEFT, at), (RIGHT, at)], FAINT)
        drawing.text(LEFT - 6, at, f"{tick:g}", "end")
    for tick in x_ticks:
        drawing.text(place(tick, low)[0], BOTTOM + 12, f"{tick:g}")
    drawing.line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], GREY)
    drawing.text((LEFT + RIGHT) / 2, BOTTOM + 31, x_name)
    drawing.text(9, (TOP + BOTTOM) / 2, y_name, turned=True)
    for line in series:
        points = [place(*point) for point in line.points]
        drawing.line(points, line.colour, line.width)
        for x, y in points if line.dots else ():
            drawing.box(x - 3, y - 3, 6, 6, line.colour)
    for row, line in enumerate(named):
        at = BOTTOM + 52 + LINE_HEIGHT * row
        drawing.box(LEFT, at - 2, 18, 4, line.colour)
        drawing.text(LEFT + 26, at, line.name, "start")
    return drawing


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers from ``low`` to ``high``."""
    power = 10.0 ** math.floor(math.log10(max(high - low, 1e-9)))
    step = next(step for part in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step := part * power) <= 6)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's, which has many scripts; it is imported by torchmetrics anyway."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), FONT_SIZE)
