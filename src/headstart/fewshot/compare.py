"""Compares heads on the same episodes, with confidence intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from headstart.fewshot.episodes import EpisodeSampler
from headstart.fewshot.heads import HeadName
from headstart.files import csv_bytes
from headstart.report.drawing import BLUE, GREEN, GREY, ORANGE, PINK, Drawing, Series, chart
from headstart.search.intervals import mean_and_half_width

BASELINE: HeadName = "prototype"
EPISODES_AT_ONCE = 50
COLOURS = (BLUE, ORANGE, GREEN, GREY, PINK, "#56B4E9", "#E69F00")


@dataclass(frozen=True)
class Compared:
    """Accuracy of a head at a number of shots."""

    head: str  # name; with "(trained)" if meta-trained
    k_shot: int  # examples per class
    acc: float  # mean accuracy of the episodes
    ci95: float  # half-width of the 95 % interval of ``acc``
    gain: float  # mean difference to the baseline on the same episodes
    gain_ci95: float  # half-width of the 95 % interval of ``gain``


@torch.no_grad()
def accuracies(head: nn.Module, sampler: EpisodeSampler, episodes: int) -> Tensor:
    """The accuracy of the head on each of the first episodes, [E]."""
    found = []
    for start in range(0, episodes, EPISODES_AT_ONCE):
        episode = sampler.batch(range(start, min(start + EPISODES_AT_ONCE, episodes)))
        predicted = head(episode.support, episode.query).argmax(dim=-1)
        found.append((predicted == episode.labels).float().mean(dim=1))
    return torch.cat(found).cpu()


def compare(heads: Mapping[str, nn.Module], samplers: Mapping[int, EpisodeSampler], episodes: int) -> list[Compared]:
    """Tests every head at every number of shots; the untrained baseline must be among the heads."""
    rows = []
    for k_shot, sampler in samplers.items():
        scores = {name: accuracies(head, sampler, episodes) for name, head in heads.items()}
        for name, found in scores.items():
            paired = mean_and_half_width(found - scores[BASELINE])
            rows.append(Compared(name, k_shot, *mean_and_half_width(found), *paired))
    return rows


def to_csv(rows: Sequence[Compared]) -> bytes:
    """The comparison as CSV."""
    return csv_bytes([vars(rows[0]), *(vars(row).values() for row in rows)])


def shots_figure(rows: Sequence[Compared]) -> Drawing:
    """Accuracy against the number of examples per class, with 95 % intervals."""
    series = []
    for name, colour in zip(dict.fromkeys(row.head for row in rows), cycle(COLOURS), strict=False):
        own = [row for row in rows if row.head == name]
        series.append(Series([(row.k_shot, row.acc) for row in own], colour, name, dots=True))
        ends = [[(row.k_shot, row.acc + row.ci95), (row.k_shot, row.acc - row.ci95)] for row in own]
        series += [Series(points, colour, width=1) for points in ends]
    heights = [y for line in series for _, y in line.points]
    shots = sorted({row.k_shot for row in rows})
    return chart(series, "examples per class", "accuracy on new classes", (min(heights), max(heights)), shots)
