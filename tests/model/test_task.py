"""Several labels per image: losses, scores, calibration and thresholds, against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.model.classifier import TransferClassifier
from headstart.model.metrics import aurocs, average_precisions
from headstart.model.multilabel import MultiLabel, fit_platt, fit_thresholds, task_of
from headstart.model.task import SingleLabel
from headstart.search.bank import BETAS, Bank, HeadSettings, Schedule, train_bank
from headstart.search.exact import PENALTIES, best_exact, fit_exact

NAMES = ["a", "b", "c", "d"]


def problem(seed: int, images: int = 80, labels: int = 5, absent: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits that tell something, and labels; the last ``absent`` labels have no positives."""
    generator = torch.Generator().manual_seed(seed)
    truth = (torch.rand(images, labels, generator=generator) < 0.3).to(torch.uint8)
    truth[:, labels - absent :] = 0
    return torch.randn(images, labels, generator=generator) + 1.5 * truth, truth


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_scores_are_scikit_learns(seed, absent):
    logits, truth = problem(seed, absent=absent)
    present = truth.bool().any(dim=0)
    decided, task = logits > 0.4, MultiLabel(5)
    task.thresholds = torch.full((5,), 0.4).sigmoid()
    found = {name.removeprefix("val/"): value for name, value in task.scores("val", logits, truth).items()}
    assert tuple(found) == task.whole
    own, scores = truth[:, present].numpy(), logits[:, present].numpy()
    expected = {
        "map": sklearn.average_precision_score(own, scores, average="macro"),
        "auroc": sklearn.roc_auc_score(own, scores, average="macro"),
        "f1": sklearn.f1_score(own, decided[:, present], average="macro", zero_division=0),
        "f1_micro": sklearn.f1_score(truth, decided, average="micro", zero_division=0),
        "exact_match": sklearn.accuracy_score(truth, decided),
        "hamming_loss": sklearn.hamming_loss(truth, decided),
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert task.score(logits, truth) == pytest.approx(expected["map"], abs=1e-6)
    by_image = MultiLabel.per_image(logits, truth)
    assert float(by_image.mean()) == pytest.approx(sklearn.label_ranking_average_precision_score(truth, logits))


def test_what_is_undefined_is_nan_and_saturated_probabilities_keep_their_order():
    logits, truth = problem(0)
    assert average_precisions(logits, truth)[4:].isnan().all()
    assert aurocs(logits, truth)[4:].isnan().all()
    torch.testing.assert_close(average_precisions(100 * logits, truth)[:4], average_precisions(logits, truth)[:4])
    assert np.isnan(MultiLabel.score(logits, torch.zeros_like(truth)))


@given(st.integers(0, 10_000))
def test_platt_is_an_optimum_of_the_smoothed_loss(seed):
    logits, truth = problem(seed)
    scale, shift = fit_platt(logits, truth)
    positives = truth.sum(dim=0)
    target = torch.where(truth.bool(), (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2)).double()
    parameters = [scale.double().requires_grad_(), shift.double().requires_grad_()]
    calibrated = logits.double() * parameters[0] + parameters[1]
    functional.binary_cross_entropy_with_logits(calibrated[:, :4], target[:, :4]).backward()
    fitted = scale[:4] != 1  # the others would turn the order around
    for parameter in parameters:
        assert parameter.grad[:4][fitted].abs().max() < 1e-6
    assert (scale > 0).all()
    assert (scale[4], shift[4]) == (1, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.6, 0.9, None]))
def test_thresholds_are_the_best_of_all(seed, wanted):
    logits, truth = problem(seed)
    probabilities = logits.sigmoid().round(decimals=1)  # with ties
    thresholds = fit_thresholds(probabilities, truth, wanted)
    assert thresholds[4] == 0.5
    for label in range(4):
        own, labels = probabilities[:, label].numpy(), truth[:, label].numpy()
        tried = [own >= candidate for candidate in np.unique(own)]
        decided = own >= float(thresholds[label])
        if wanted is None:
            best = max(sklearn.f1_score(labels, each) for each in tried)
            assert sklearn.f1_score(labels, decided) == pytest.approx(best)
            continue
        precisions = [sklearn.precision_score(labels, each) for each in tried]
        recalls = [sklearn.recall_score(labels, each) for each in tried]
        if enough := [recall for recall, precision in zip(recalls, precisions, strict=True) if precision >= wanted]:
            assert sklearn.recall_score(labels, decided) == pytest.approx(max(enough))
            assert sklearn.precision_score(labels, decided) >= wanted
        else:
            assert sklearn.precision_score(labels, decided) == pytest.approx(max(precisions))


def matrix(images: int = 200, width: int = 12, labels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, width, generator=generator)
    noisy = features @ torch.randn(width, labels, generator=generator) + torch.randn(
        images, labels, generator=generator
    )
    return features, (noisy > 0.5).to(torch.uint8)


def test_the_exact_optimum_is_scikit_learns_one_against_the_rest():
    features, labels = matrix()
    head = fit_exact(Labelled.of(features, labels), 3, l2=0.02, tolerance=1e-6)
    for label in range(3):
        oracle = LogisticRegression(C=1 / (0.02 * 200), max_iter=5000, tol=1e-9).fit(features, labels[:, label])
        torch.testing.assert_close(head.weight[label], torch.from_numpy(oracle.coef_[0]).float(), rtol=0, atol=1e-3)
        assert float(head.bias[label]) == pytest.approx(oracle.intercept_[0], abs=1e-3)


def test_the_best_penalty_is_that_of_the_lowest_validation_loss():
    features, labels = matrix()
    train, val = Labelled.of(features[:120], labels[:120]), Labelled.of(features[120:], labels[120:])
    l2, found = best_exact(train, val, 3, tolerance=1e-6)
    assert l2 in PENALTIES
    losses = MultiLabel.losses(found.head(features[120:]), labels[120:])
    assert found.loss == pytest.approx(float(losses.mean()))
    assert found.score == pytest.approx(MultiLabel.score(found.head(features[120:]), labels[120:]))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_bank_has_the_gradients_of_the_training_loss(weighted):
    features, labels = matrix()
    weights = torch.tensor([1.0, 4.0, 0.5]) if weighted else None
    setting = [HeadSettings(0.01, 0.1, 0.2)]
    bank = Bank(setting, 3, 12, seed=3, device=torch.device("cpu"), class_weights=weights, task=MultiLabel)
    head = bank.head(0).requires_grad_()
    MultiLabel(3).training_loss(0.2, weights)(head(features), labels).backward()
    bank.step(features, labels, 1.0)
    first = bank.moments[0][0][0] / (1 - BETAS[0])  # after one step, the gradient
    torch.testing.assert_close(first, head.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_bank_scores_its_heads():
    features, labels = matrix()
    train, val = Labelled.of(features[:120], labels[:120]), Labelled.of(features[120:], labels[120:])
    (found,) = train_bank([HeadSettings(0.03, 0.01, 0.0)], train, val, 3, Schedule(20, 32, 0.04, 0))
    logits = found.head(features[120:])
    assert found.score == pytest.approx(MultiLabel.score(logits, labels[120:]))
    assert found.score > 0.8
    assert found.loss == pytest.approx(float(MultiLabel.losses(logits, labels[120:]).mean()), rel=1e-5)


def test_balanced_weights_give_positives_and_negatives_of_a_label_the_same_weight():
    counts = torch.tensor([10, 50, 0])
    assert MultiLabel.balanced(counts, 100).tolist() == [9, 1, 100]
    assert task_of(torch.zeros(2)) is SingleLabel
    assert task_of(torch.zeros(2, 3)) is MultiLabel


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"multilabel": True, "best_by": "val/f1"}, "--model.best_by"),
        ({"best_by": "val/map"}, "--model.best_by"),
        ({"min_precision": 0.9}, "--model.min_precision"),
    ],
)
def test_options_of_the_other_task_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        TransferClassifier(NAMES, "timm/test_resnet", "random", 32, **options)


def test_a_checkpoint_of_the_other_task_is_refused():
    one, several = (
        TransferClassifier(NAMES, "timm/test_resnet", "random", 32, multilabel=flag) for flag in (False, True)
    )
    state = {f"head.{name}": tensor for name, tensor in one.head.state_dict().items()}
    for own, other in ((one, several), (several, one)):
        made = {"class_names": NAMES, "digest": own.weights_digest, **other.task.state(True)}
        with pytest.raises(UserError, match="per image, but the data has"):
            own.take({"headstart": made, "state_dict": state})
    damaged = {
        "class_names": NAMES,
        "digest": several.weights_digest,
        **several.task.state(True),
        "scale": torch.ones(3),
    }
    with pytest.raises(UserError, match="damaged"):
        several.take({"headstart": damaged | {"preprocessing": {}}, "state_dict": state})
