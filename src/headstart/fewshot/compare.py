"""Compares heads on the same episodes, with confidence intervals and paired differences."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.data.loaders import BatchOrder
from headstart.fewshot.episodes import EpisodeSampler
from headstart.fewshot.heads import HeadName
from headstart.files import csv_bytes
from headstart.model.classifier import TransferClassifier
from headstart.model.schedule import warmup_cosine
from headstart.report.drawing import BLUE, GREEN, GREY, ORANGE, PINK, Drawing, Series, chart
from headstart.search.intervals import mean_and_half_width

BASELINE: HeadName = "prototype"
AS_TRAIN = "linear, trained as `train` does"
BATCH_SIZE, EPOCHS = 32, 25
DEFAULTS = {name: option.default for name, option in inspect.signature(TransferClassifier).parameters.items()}
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


class AsTrain(nn.Module):
    """A linear head trained as `train` does by default, but on the support only: the last epoch, not the best."""

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        """Support [B, N, K, D], query [B, N, Q, D] -> logits [B, N * Q, N]; each task as ``train_bank`` would."""
        batch, n_way, k_shot, width = support.shape
        rows, labels = support.flatten(1, 2), torch.arange(n_way, device=support.device).repeat_interleave(k_shot)
        orders = (BatchOrder(len(labels), BATCH_SIZE, 0, partial(int, epoch)) for epoch in range(EPOCHS))
        order = list(chain.from_iterable(each.batches() for each in orders))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            start = nn.Linear(width, n_way).to(rows)
            head = [tensor.detach().repeat(batch, *[1] * tensor.ndim).requires_grad_() for tensor in start.parameters()]
            optimizer = torch.optim.AdamW(head, DEFAULTS["lr"], weight_decay=DEFAULTS["weight_decay"])
            warmup_steps = round(len(order) * DEFAULTS["warmup"])
            for step, chosen in enumerate(order):
                optimizer.param_groups[0]["lr"] = DEFAULTS["lr"] * warmup_cosine(step, warmup_steps, len(order))
                logits = (rows[:, chosen] @ head[0].mT + head[1][:, None]).flatten(0, 1)
                truth, smoothing = labels[chosen].repeat(batch), DEFAULTS["label_smoothing"]
                loss = functional.cross_entropy(logits, truth, label_smoothing=smoothing, reduction="sum") / len(chosen)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return query.flatten(1, 2) @ head[0].detach().mT + head[1].detach()[:, None]


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
