"""Two runs side by side: scores, a paired test on the same test images, settings, figures. Does not import torch."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from markupsafe import Markup

from headstart.errors import UserError
from headstart.files import read_csv, read_regular
from headstart.runs.history import PREDICTIONS, Run
from headstart.templates import rendered

FIGURE = re.compile(r"<figure><figcaption>([^<]+)</figcaption>(<svg .*?</svg>)</figure>", re.DOTALL)
# The elements of our drawings; nothing else of a report is shown.
NAMES = "class|role|aria-label|viewBox|style|points|fill|stroke|stroke-width|x|y|width|height|text-anchor|transform"
ELEMENT = re.compile(rf'</?(?:svg|polyline|rect|text)(?: (?:{NAMES})="[^"<>]*")*/?>')
MOST = 50  # images on which two runs disagree that are listed


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and what not."""

    rows: dict[str, tuple[list[str], str]]  # both values and their difference, by score or setting
    paired: str  # the test on the same images, in a sentence
    disagreed: list[list[str]]  # images that only one run has right: path, class, both predictions


def compared(first: Run, second: Run, settings: Sequence[Mapping[str, Any]]) -> Comparison:
    """Scores, settings that differ, and the paired test."""
    results, rows = [first.result, second.result], dict[str, tuple[list[str], str]]()
    for name in dict.fromkeys(name for result in results for name in result if name.startswith(("val/", "test/"))):
        values = [result.get(name) for result in results]
        numbers = [value for value in values if isinstance(value, int | float)]
        difference = f"{numbers[1] - numbers[0]:+.3f}" if len(numbers) == 2 else ""
        rows[name] = [f"{value:.3f}" if value in numbers else str(value or "") for value in values], difference
    for name in dict.fromkeys(name for own in settings for name in own):
        values = [own.get(name) for own in settings]
        if values[0] != values[1]:
            rows[name] = list(map(str, values)), ""
    tables = [_predictions(run) for run in (first, second)]
    lacking = [run.folder.name for run, table in zip((first, second), tables, strict=True) if not table]
    if lacking:
        return Comparison(rows, f"not tested, since {', '.join(lacking)} has no {PREDICTIONS} of test images", [])
    return _paired(rows, *tables)


def _predictions(run: Run) -> dict[tuple[str, str], str]:
    """The prediction for each test image, by its path and true class."""
    file = run.folder / PREDICTIONS
    if not file.is_file():
        return {}
    found = read_csv(PREDICTIONS, file, ["path", "class", "prediction"], errors="surrogateescape")
    return {(row["path"], row["class"]): row["prediction"] for row in found}


def _paired(
    rows: dict[str, tuple[list[str], str]], first: dict[tuple[str, str], str], second: dict[tuple[str, str], str]
) -> Comparison:
    """McNemar's exact test: of the images that only one run has right, is either run's share more than chance?"""
    from scipy.stats import binomtest  # slow to import

    same = [image for image in first if image in second]
    if not same:
        return Comparison(rows, "not tested, since they have no test image in common", [])
    right = [(first[path, true] == true, second[path, true] == true) for path, true in same]
    gained, lost = right.count((False, True)), right.count((True, False))
    difference, count = (gained - lost) / len(same), len(same)
    variance = ((gained + lost) / count - difference**2) / count
    half = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    chance = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    said = (
        f"on {count} test images in common, {gained} are right only in the second run and {lost} only in the first: "
        f"{100 * difference:+.1f} points (95 % interval ± {100 * half:.1f}; McNemar's exact test: p = {chance:.3f})"
    )
    disagreed = [
        [*image, first[image], second[image]] for image, (one, other) in zip(same, right, strict=True) if one != other
    ]
    return Comparison(rows, said, disagreed[:MOST])


def page(names: Sequence[str], found: Comparison, reports: Sequence[Path]) -> bytes:
    """The comparison as an HTML page, with the figures of both reports side by side."""
    figures = [_figures(report) for report in reports]
    both = {title: [each.get(title, "") for each in figures] for title in dict.fromkeys([*figures[0], *figures[1]])}
    return rendered("runs/compare.html.jinja", title=" and ".join(names), names=names, found=found, figures=both)


def _figures(report: Path) -> dict[str, Markup]:
    """The drawings in a report, by title; anything else is left out."""
    if not report.is_file():
        return {}
    try:
        text = read_regular(report).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"{report}: cannot be read ({error})") from error
    found = FIGURE.findall(text)
    return {title: Markup(svg) for title, svg in found if _is_drawing(svg)}


def _is_drawing(svg: str) -> bool:
    """Whether it has only our elements and attributes, so that a report from elsewhere runs nothing."""
    return all(ELEMENT.fullmatch(tag) for tag in re.findall(r"<[^>]*>?", svg))
