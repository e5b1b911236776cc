"""A head's answers for files: classes and probabilities, sets of classes, `unknown`, and maps of where it looks."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from headstart.data.splits import BETWEEN
from headstart.deploy.explain import explainer, overlay
from headstart.errors import UserError
from headstart.features.arithmetic import BATCH
from headstart.features.extract import Computed
from headstart.features.stream import FileStream
from headstart.model.backbone import FrozenBackbone
from headstart.model.classifier import TransferClassifier
from headstart.model.multilabel import MultiLabel
from headstart.model.sets import images_needed, sets_of, threshold
from headstart.model.task import SingleLabel


@dataclass(frozen=True)
class Prediction:
    """A head's prediction for a file."""

    path: str  # as given, or below the given folder
    label: str = ""  # the most probable class, or that it is unknown; or all labels above their thresholds
    best: tuple[tuple[str, float], ...] = ()  # the k most probable classes with calibrated probabilities
    known: float | None = None  # as ``Known``; None: the head has none
    above: tuple[tuple[str, float], ...] | None = None  # these labels, if there may be several
    probabilities: tuple[float, ...] = ()  # of all classes, if they were asked for
    names: tuple[str, ...] = ()  # the set of classes that contains the true one as often as promised, if asked for
    heat: Tensor | None = None  # where the head looks for the most probable class, [h, w], if it was asked for
    error: str = ""  # why there is no prediction; else empty

    def as_row(self, sets: bool = False) -> dict[str, Any]:
        """The prediction as a JSON object; with ``sets`` also the set of classes."""
        if not self.best:
            return {"path": self.path, "error": self.error}
        if self.above is not None:
            return {"path": self.path, "labels": dict(self.above), "top": dict(self.best)}
        row: dict[str, Any] = {"path": self.path, "label": self.label, "probability": self.best[0][1]}
        return row | {"known": self.known} | ({"set": self.names} if sets else {}) | {"top": dict(self.best)}


class Answers:
    """How a head answers: with which sets of classes, and when with `unknown`; see the options of the same names.

    Raises:
        UserError: the head does not support what is asked for.
    """

    def __init__(
        self,
        module: TransferClassifier,
        unknown: float | None = None,
        coverage: float | None = None,
        min_probability: float = 0.0,
    ) -> None:
        asked = {"--unknown": unknown, "--coverage": coverage, "--min_probability": min_probability}
        if module.hparams["multilabel"] and (found := [name for name, value in asked.items() if value]):
            raise UserError(f"{found[0]}: is for one label per image; the labels of this head have thresholds")
        self.known, self.unknown, self.min_probability = module.known, unknown, min_probability
        self.several = module.task if isinstance(module.task, MultiLabel) else None
        self.least: float | None = None  # the probability from which on a class is in the set
        self.word = "(unknown)" if "unknown" in module.class_names else "unknown"
        if unknown is not None:
            images = len(self.known.distances) if self.known else 0
            _check_images(f"--unknown={unknown}", images, math.ceil(1 / unknown - 1 - 1e-9))
        if coverage is not None and isinstance(module.task, SingleLabel):
            validation = module.task.true_probabilities
            _check_images(f"--coverage={coverage}", len(validation), images_needed(coverage))
            self.least = threshold(validation, coverage)

    def label(self, best: tuple[str, float], known: float | None) -> str:
        """The best class, or `unknown`: below the least probability, or too far from all classes."""
        refused = known is not None and self.unknown is not None and known <= self.unknown
        return self.word if refused or best[1] < self.min_probability else best[0]


def _check_images(option: str, images: int, needed: int) -> None:
    if images < needed:
        why = "" if images else "; take best.ckpt of a run with the cache, validation and this version"
        raise UserError(f"{option}: needs {needed} validation images, but the head has {images or 'none'}{why}")


class Predictor:
    """Maps paths to predictions, in order and in constant memory.

    Each has the ``top_k`` classes, and with ``explain`` a map of where the head looks, by a ``method``.
    """

    def __init__(
        self,
        module: TransferClassifier,
        stream: FileStream,
        top_k: int = 5,
        explain: bool = False,
        answers: Answers | None = None,
        probabilities: bool = False,
    ) -> None:
        self.module, self.stream, self.probabilities = module, stream, probabilities
        self.answers = answers or Answers(module)
        self.top_k = min(top_k, len(module.class_names))
        self._explain = None
        if explain:
            if not isinstance(stream.network, FrozenBackbone):
                raise UserError("--explain: there are no maps of int8 features; add --feature_precision=fp32")
            self._explain = explainer(module, stream.network)
        self.method = self._explain.method if self._explain else ""

    def __call__(self, paths: Iterable[str]) -> Iterator[Prediction]:
        """Yields a prediction per path."""
        for computed in self.stream(paths):
            yield from self.predictions(computed)

    @torch.no_grad()
    def predictions(self, computed: Computed, maps: bool = True) -> Iterator[Prediction]:
        """Yields a prediction per image of the last batch of the stream; ``maps``: with their maps, if it explains."""
        # In batches of one size, so that an image has the same bits whatever is predicted with it.
        whole = functional.pad(computed.features, (0, 0, 0, BATCH - len(computed.features)))
        probabilities = self.module.task.probabilities(self.module.head(whole))[: len(computed.features)]
        order = probabilities.argsort(dim=1, descending=True, stable=True)
        known = self.answers.known(computed.features).tolist() if self.answers.known else None
        sets = sets_of(probabilities, self.answers.least) if self.answers.least is not None else None
        finite = computed.features.isfinite().all(dim=1)
        heat = self._explain(order[:, 0]) if self._explain and maps and len(order) else None
        number = {key: place for place, key in enumerate(computed.rows)}
        for key in computed.keys:
            path, place = os.fsdecode(key), number.get(key)
            if place is None:
                yield Prediction(path, error=computed.failures[key])
            elif not finite[place]:
                yield Prediction(path, error="its features are not finite")
            else:
                labels = order[place].tolist()
                names, shares = [self.module.class_names[label] for label in labels], probabilities[place, labels]
                ranked = tuple(zip(names, shares.tolist(), strict=True))
                every = tuple(probabilities[place].tolist()) if self.probabilities else ()
                own = heat[place] if heat is not None else None
                found = Prediction(path, best=ranked[: self.top_k], probabilities=every, heat=own)
                if self.answers.several:
                    reached = (shares >= self.answers.several.thresholds[labels]).tolist()
                    above = tuple(pair for pair, enough in zip(ranked, reached, strict=True) if enough)
                    yield replace(found, label=BETWEEN.join(name for name, _ in above), above=above)
                    continue
                share = round(known[place], 6) if known else None
                held = tuple(names[: int(sets[place].sum())]) if sets is not None else ()
                yield replace(found, label=self.answers.label(ranked[0], share), known=share, names=held)

    def drawn(self, prediction: Prediction) -> Image.Image:
        """The picture of a prediction with its map over it."""
        assert prediction.heat is not None
        return overlay(self.stream.pixels(prediction.path), prediction.heat)
