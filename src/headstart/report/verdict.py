"""The verdict on a head: how good it is compared with a trivial baseline, what it confuses, and what to do next."""

from dataclasses import dataclass

from headstart.model.classifier import TransferClassifier
from headstart.model.multilabel import threshold_scores
from headstart.report.evaluation import Evaluation, Predictions
from headstart.report.learning_curve import LearningCurve
from headstart.report.multilabel import MultilabelEvaluation
from headstart.search.intervals import wilson
from headstart.terminal import program, say

SHOWN = 3  # pairs of classes
SURE, FEW_SURE, MANY_SURE = 0.9, 3, 0.1  # a confidence, and the number and share of such mistakes that stand out
WIDE = 0.08  # half of an interval


@dataclass(frozen=True)
class Verdict:
    """What the numbers say, in words."""

    accuracy: str
    usual: str  # what a trivial baseline would reach
    confused: str
    advice: str  # the next step
    weak: str = "confused"  # what ``confused`` lists

    def say(self) -> None:
        """Prints it."""
        say(f"verdict:  {self.accuracy}; {self.usual}")
        say(f"{self.weak + ':':9} {self.confused}")
        say(f"advice:   {self.advice}")


def verdict_of(
    evaluation: Predictions, curve: LearningCurve | None, module: TransferClassifier, data: str, checkpoint: str
) -> Verdict:
    """The verdict; ``data`` are the options that select the images, for the command of the next step."""
    if isinstance(evaluation, MultilabelEvaluation):
        return _multilabel(evaluation, module, data, checkpoint)
    assert isinstance(evaluation, Evaluation)
    images, right = len(evaluation.items), int(evaluation.right.sum())
    low, high = wilson(right, images)
    counts = evaluation.confusion.sum(dim=1)
    largest = int(counts.argmax())
    share, split = int(counts[largest]) / images, "validation" if evaluation.split == "val" else "test"
    pairs = [
        f"{evaluation.class_names[true]} taken for {evaluation.class_names[predicted]} ({number} of {counts[true]})"
        for true, predicted, number in evaluation.most_confused(SHOWN)
    ]
    sure = int((~evaluation.right & (evaluation.confidence >= SURE)).sum())
    few = f"{images} {split} images tell the accuracy to ± {50 * (high - low):.0f} points only"
    further = _further(module, data, checkpoint)
    steps = [
        (right == images, f"try photos from elsewhere: {program('evaluate')} --ckpt_path={checkpoint} --data.root=…"),
        (low <= share, further[-1][1]),
        (
            sure >= max(FEW_SURE, MANY_SURE * (images - right)),
            f"look at the labels, since {sure} of {images - right} mistakes are {100 * SURE:.0f} % sure or more"
            f": {program('check')} {data}",  # wing: audit
        ),
        (bool(curve and curve.rises), f"add more photos. {curve.advice}" if curve else ""),
        ((high - low) / 2 > WIDE, f"add more photos: {few}"),
        *further,
    ]
    return Verdict(
        f"{100 * right / images:.1f} % of {images} {split} images are right "
        f"(95 % interval: {100 * low:.1f} to {100 * high:.1f} %)",
        f"always answering {evaluation.class_names[largest]} would be right for {100 * share:.1f} %",
        ", ".join(pairs) or "nothing",
        next(step for fits, step in steps if fits),
    )


def _further(module: TransferClassifier, data: str, checkpoint: str) -> list[tuple[bool, str]]:
    """Steps that may help any head, each with whether it is to be taken; the last one always is."""
    stronger = f"{program('train')} {data} --model.weights=imagenet (better for photographs)"
    return [
        (module.backbone.weights == "bundled", f"other features: {stronger}"),
        (not module.finetuned, f"fine-tune: {program('finetune')} --ckpt_path={checkpoint}"),  # wing: finetune
        (True, f"other features: {program('tune')} {data} --backbones=resnet18,efficientnet_b0"),
    ]


def _multilabel(evaluation: MultilabelEvaluation, module: TransferClassifier, data: str, checkpoint: str) -> Verdict:
    """The verdict on several labels per image."""
    images, precisions = len(evaluation.items), evaluation.by_label["ap"]
    present = (~precisions.isnan()).nonzero()[:, 0].tolist()
    rate = float(evaluation.truth[:, present].float().mean())
    exact = threshold_scores(evaluation.predicted, evaluation.labels)["exact_match"]
    worst = sorted(present, key=lambda label: float(precisions[label]))[:SHOWN]
    return Verdict(
        f"mean average precision {float(precisions.nanmean()):.3f} on {images} images, all labels right for "
        f"{100 * exact:.1f} %",
        f"a random order would reach {rate:.3f}",
        ", ".join(f"{evaluation.class_names[label]} ({float(precisions[label]):.3f})" for label in worst),
        next(step for fits, step in _further(module, data, checkpoint) if fits),
        "weakest",
    )
