"""The scores against scikit-learn's, on problems with absent classes, unequal classes and ties."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from headstart.model.classifier import TransferClassifier
from headstart.model.metrics import MeanF1, MeanRecall, mean_auroc
from support import draw, newest_run


@pytest.mark.fault("split that lacks classes")
@settings(max_examples=200, deadline=None)
@given(
    classes=st.integers(2, 9),
    images=st.integers(2, 80),
    levels=st.sampled_from([2, 5, 10**6]),  # few levels: ties
    seed=st.integers(0, 2**32 - 1),
)
def test_means_are_over_the_classes_present(classes, images, levels, seed):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(classes, 0.4))  # unequal classes, some of them absent
    labels = random.choice(classes, size=images, p=weights)
    scores = np.exp(3 * np.floor(random.random((images, classes)) * levels) / levels)
    scores = torch.from_numpy(scores / scores.sum(axis=1, keepdims=True))
    target, predicted = torch.from_numpy(labels), scores.argmax(dim=1).numpy()
    present = np.unique(labels)
    found = {}
    for name, metric in {"recall": MeanRecall(classes), "f1": MeanF1(classes)}.items():
        for part in torch.arange(images).split(31):  # in batches
            metric.update(scores[part], target[part])
        found[name] = float(metric.compute())
    oracle = {"labels": present, "average": "macro", "zero_division": 0}
    assert found["recall"] == pytest.approx(recall_score(labels, predicted, **oracle), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, **oracle), abs=1e-6)
    if len(present) == 1:
        assert np.isnan(mean_auroc(scores, target))
    else:
        areas = [roc_auc_score(labels == label, scores[:, label]) for label in present]
        assert mean_auroc(scores, target) == pytest.approx(np.mean(areas), abs=1e-6)


@pytest.mark.fault("split that lacks classes")
def test_a_perfect_head_has_perfect_scores_where_classes_are_absent():
    scores = TransferClassifier([f"c{label}" for label in range(81)]).configure_metrics("val/")
    labels = torch.arange(60)
    probabilities = torch.eye(81)[labels] * 0.9 + 0.1 / 81
    found = scores(probabilities, labels)
    assert [float(found[f"val/{name}"]) for name in ("acc", "balanced_acc", "f1")] == [1, 1, 1]
    assert mean_auroc(probabilities, labels) == 1


@pytest.mark.fault("split with one class")
def test_a_split_of_one_class_has_no_auroc(tmp_path, train, capsys):
    root = draw(tmp_path / "splits/train", images=8).parent
    shutil.copytree(root / "train/red", root / "val/red")
    (root / "test").mkdir()
    for split in ("val", "test"):
        for name in ("blue", "green", "red"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
    draw(root / "test", images=2, seed=5)
    result = train(root, "--trainer.max_epochs=2", "--report=true")
    assert "val/auroc" not in result
    assert 0 <= result["test/auroc"] <= 1
    assert "NaN" not in (newest_run() / "result.json").read_text()
    assert json.loads((newest_run() / "result.json").read_text())["val/balanced_acc"] == result["val/balanced_acc"]
    assert capsys.readouterr().out.count("val/auroc: is undefined and left out") == 1
