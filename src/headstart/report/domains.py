"""Scores of each domain of the images, and the worst of them: how well a classifier works across domains."""

import math
from typing import Any

from rich.table import Table

from headstart.report.evaluation import Evaluation, Predictions
from headstart.terminal import one_line, say


def domain_scores(evaluation: Predictions | None) -> dict[str, Any]:
    """Scores for ``result.json``: `domains`, with images, acc and auroc of each, and the lowest accuracy; or nothing.

    An AUROC that is undefined, since a domain has images of one class only, is None.
    """
    parts = evaluation.domains if isinstance(evaluation, Evaluation) else {}
    if not evaluation or not parts:
        return {}
    found = {
        name: {
            "images": len(part.items),
            "acc": part.acc,
            "auroc": None if math.isnan(part.auroc) else part.auroc,
        }
        for name, part in parts.items()
    }
    return {f"{evaluation.split}/worst_domain_acc": min(part.acc for part in parts.values()), "domains": found}


def say_domains(result: dict[str, Any]) -> None:
    """Prints the scores of each domain, the worst first."""
    if "domains" not in result:
        return
    table = Table("domain", "images", "acc", "auroc", title="by domain, the worst first")
    for name, scores in sorted(result["domains"].items(), key=lambda entry: entry[1]["acc"]):
        auroc = "" if scores["auroc"] is None else f"{scores['auroc']:.3f}"
        table.add_row(one_line(name) or "(none)", str(scores["images"]), f"{scores['acc']:.3f}", auroc)
    say(table)
