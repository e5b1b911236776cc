"""What is left out at the end of a fit, where it would cost too much."""

from types import SimpleNamespace

import torch

from headstart.features.matrix import Labelled
from headstart.fit import known
from support import newest_run


def test_of_many_images_some_are_used_evenly_spread(monkeypatch):
    monkeypatch.setattr(known, "MOST", 5)
    rows = torch.arange(9.0)[:, None]
    module = SimpleNamespace(features=lambda features: features)
    features, labels = known._features(module, Labelled.of(rows, torch.arange(9)))
    assert features[:, 0].tolist() == labels.tolist() == [0, 2, 4, 6, 8]


def test_features_that_are_too_wide_are_said(colours, train, monkeypatch, capsys):
    monkeypatch.setattr(known, "WIDEST", 10)
    train(colours, "--trainer.max_epochs=1")
    assert "known: is left out, since more than 10 features" in capsys.readouterr().out
    best = torch.load(newest_run() / "checkpoints/best.ckpt", weights_only=True)["headstart"]
    assert "known" not in best
    assert len(best["true_probabilities"]) > 0
