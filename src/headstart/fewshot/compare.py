"""Compares heads on the same episodes, with confidence intervals and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from headstart.fewshot.episodes import EpisodeSampler
from headstart.fewshot.heads import HeadName
from headstart.files import csv_bytes
from headstart.report.figures import BLUE, GREEN, GREY, ORANGE
from headstart.search.intervals import mean_and_half_width

BASELINE: HeadName = "prototype"
EPISODES_AT_ONCE = 50
COLOURS = (BLUE, ORANGE, GREEN, GREY, "#CC79A7", "#56B4E9", "#E69F00")


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


def shots_figure(rows: Sequence[Compared]) -> Figure:
    """Accuracy against the number of examples per class, with 95 % intervals."""
    figure = Figure(figsize=(7, 4.5), dpi=100, layout="tight")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row.head for row in rows))
    for number, name in enumerate(names):
        points = [(row.k_shot, row.acc, row.ci95) for row in rows if row.head == name]
        shots, means, widths = zip(*points, strict=True)
        colour = COLOURS[number % len(COLOURS)]
        dashes = "--" if name.endswith("(trained)") else "-"
        axes.errorbar(shots, means, widths, color=colour, linestyle=dashes, marker="o", capsize=3, label=name)
    axes.set_xticks(sorted({row.k_shot for row in rows}))
    axes.set(xlabel="examples per class", ylabel="accuracy on new classes")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
