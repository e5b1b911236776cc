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
INK = "#222222"  # in SVG, the colour of the page's text
FONT_SIZE, LINE_HEIGHT = 12, 17
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 52, 440, 10, 290  # of a chart, and of its axes
FINER = 2  # pixels are drawn this much finer, so that lines are smooth


@dataclass(frozen=True)
class Line:
    """A line through points; positions are in pixels from the top left."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0

    def svg(self) -> Markup:
        """The element."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)
        form = '<polyline points="{}" fill="none" stroke="{}" stroke-width="{}"/>'
        return Markup(form).format(points, _of_page(self.colour), self.width)

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        """Draws it on pixels that are ``FINER``."""
        points = [(x * FINER, y * FINER) for x, y in self.points]
        pen.line(points, self.colour, max(1, round(self.width * FINER)), "curve")


@dataclass(frozen=True)
class Box:
    """A filled box."""

    x: float
    y: float
    width: float
    height: float
    colour: str

    def svg(self) -> Markup:
        """The element."""
        form = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"/>'
        return Markup(form).format(self.x, self.y, self.width, self.height, _of_page(self.colour))

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        """Draws it on pixels that are ``FINER``."""
        corners = self.x, self.y, self.x + self.width, self.y + self.height
        pen.rectangle([round(corner * FINER) for corner in corners], self.colour)


@dataclass(frozen=True)
class Text:
    """A text that starts, ends or has its middle at a position, on its vertical centre."""

    x: float
    y: float
    text: str
    anchor: str = "middle"  # start, middle or end
    turned: bool = False  # to be read from below
    colour: str = INK

    def svg(self) -> Markup:
        """The element."""
        turn = Markup(' transform="rotate(-90 {:.1f} {:.1f})"').format(self.x, self.y) if self.turned else ""
        form = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="{}"{}>{}</text>'
        return Markup(form).format(self.x, self.y + 4, self.anchor, _of_page(self.colour), turn, self.text)

    def draw(self, image: Image.Image) -> None:
        """Draws it."""
        font = _font()
        length = math.ceil(font.getlength(self.text))
        mask = Image.new("L", (length, LINE_HEIGHT))
        ImageDraw.Draw(mask).text((0, LINE_HEIGHT / 2), self.text, 255, font, "lm")
        before = {"start": 0, "middle": length / 2, "end": length}[self.anchor]
        place = self.x - before, self.y - LINE_HEIGHT / 2
        if self.turned:
            mask = mask.rotate(90, expand=True)
            place = self.x - LINE_HEIGHT / 2, self.y - length + before
        image.paste(self.colour, (round(place[0]), round(place[1])), mask)


class Drawing:
    """Lines, boxes and texts on an area of ``width`` x ``height`` pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.marks: list[Line | Box | Text] = []

    def svg(self, about: str = "") -> Markup:
        """The drawing as an inline SVG element, with a text for those who cannot see it."""
        form = '<svg class="drawing" role="img" aria-label="{}" viewBox="0 0 {} {}" style="max-width:{}px">{}</svg>'
        content = Markup("").join(mark.svg() for mark in self.marks)
        return Markup(form).format(about, self.width, self.height, self.width, content)

    def image(self) -> Image.Image:
        """The drawing as pixels; texts lie above the rest."""
        fine = Image.new("RGB", (self.width * FINER, self.height * FINER), "white")
        pen = ImageDraw.Draw(fine, "RGBA")  # blends colours that are transparent
        for mark in self.marks:
            if not isinstance(mark, Text):
                mark.draw(pen)
        image = fine.reduce(FINER)
        for mark in self.marks:
            if isinstance(mark, Text):
                mark.draw(image)
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
    y_ticks: Sequence[float] = (),
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

    for tick in y_ticks or ticks(low, high):
        at = place(x_ticks[0], tick)[1]
        drawing.marks += [Line([(LEFT, at), (RIGHT, at)], "#99999955"), Text(LEFT - 6, at, f"{tick:g}", "end")]
    for tick in x_ticks:
        drawing.marks.append(Text(place(tick, low)[0], BOTTOM + 12, f"{tick:g}"))
    drawing.marks += [Line([(LEFT, TOP), (LEFT, BOTTOM), (RIGHT, BOTTOM)], GREY)]
    drawing.marks += [Text((LEFT + RIGHT) / 2, BOTTOM + 31, x_name), Text(9, (TOP + BOTTOM) / 2, y_name, turned=True)]
    for line in series:
        points = [place(*point) for point in line.points]
        drawing.marks.append(Line(points, line.colour, line.width))
        drawing.marks += [Box(x - 3, y - 3, 6, 6, line.colour) for x, y in points if line.dots]
    for row, line in enumerate(named):
        at = BOTTOM + 52 + LINE_HEIGHT * row
        drawing.marks += [Box(LEFT, at - 2, 18, 4, line.colour), Text(LEFT + 26, at, line.name, "start")]
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


def _of_page(colour: str) -> str:
    return "currentColor" if colour == INK else colour
