"""The bank of heads, the exact optimum, and the search that uses them."""

import csv
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from headstart.cli import main
from headstart.data.loaders import BatchOrder, FeatureLoader
from headstart.data.module import ImageFolderData
from headstart.data.splits import Item, folds_of
from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.model.backbone import FrozenBackbone
from headstart.search.backbones import Heads, Trial, best_of, compare
from headstart.search.bank import BETAS, Bank, HeadSettings, Schedule, TrainedHead, score_and_loss, train_bank
from headstart.search.exact import PENALTIES, TooManyPasses, best_exact, fit_exact
from headstart.search.knn import KS, knn_scores
from support import COLOURS, draw, newest_run, rows_of


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    centres = torch.randn(4, 16, generator=generator)
    return centres[labels] + 1.5 * torch.randn(200, 16, generator=generator), labels


SETTINGS = [HeadSettings(0.01, 0.0, 0.0), HeadSettings(0.003, 0.5, 0.1), HeadSettings(0.1, 0.01, 0.2)]


def test_every_head_of_a_bank_is_what_adamw_makes_of_it_alone(problem):
    features, labels = problem
    bank = Bank(SETTINGS, 4, 16, seed=3, device=torch.device("cpu"))
    order = BatchOrder(200, 32, seed=1)
    batches = list(FeatureLoader(Labelled.of(features, labels), order)) * 4
    alone = []
    for setting in SETTINGS:
        torch.manual_seed(3)
        head = torch.nn.Linear(16, 4)
        optimizer = torch.optim.AdamW(head.parameters(), lr=setting.lr, weight_decay=setting.weight_decay)
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(head(x), y, label_smoothing=setting.label_smoothing).backward()
            optimizer.step()
        alone.append(head)
    for x, y in batches:
        bank.step(x, y, 1.0)
    for number, head in enumerate(alone):
        torch.testing.assert_close(bank.head(number).weight, head.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bank.head(number).bias, head.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_bank_has_the_losses_of_cross_entropy(problem):
    features, labels = problem
    bank = Bank(SETTINGS, 4, 16, seed=3, device=torch.device("cpu"))
    loss = bank.losses(Labelled.of(features, labels))
    logits = functional.linear(features, bank.weight[1], bank.bias[1])
    assert loss[1].item() == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_exact_optimum_has_no_gradient_and_nothing_below_it(problem):
    features, labels = problem
    train = Labelled.of(features, labels)
    head = fit_exact(train, 4, l2=0.01)
    weight, bias = head.weight.detach().double().requires_grad_(), head.bias.detach().double().requires_grad_()

    def objective(weight, bias):
        logits = functional.linear(features.double(), weight, bias)
        return functional.cross_entropy(logits, labels) + 0.005 * weight.square().sum()

    least = objective(weight, bias)
    gradients = torch.autograd.grad(least, (weight, bias))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        moved = weight + 0.01 * torch.randn(weight.shape, generator=generator)
        assert objective(moved, bias) > least


@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_exact_head_is_scikit_learns_on_standardised_features(problem, weighted):
    features, labels = problem[0] * torch.logspace(-2, 3, 16), problem[1]
    features[:, 3] = 7.0  # constant
    train, val = Labelled.of(features[:150], labels[:150]), Labelled.of(features[150:], labels[150:])
    of_classes = torch.tensor([1.0, 5.0, 1.0, 0.5]) if weighted else None
    weights = None if of_classes is None else of_classes[train.labels]
    l2, found = best_exact(train, val, 4, of_classes, tolerance=1e-6)
    scale = StandardScaler().fit(features[:150].double())
    total = 150 if weights is None else float(weights.sum())

    def oracle(l2: float) -> LogisticRegression:
        head = LogisticRegression(C=1 / (l2 * total), max_iter=5000, tol=1e-8)
        return head.fit(scale.transform(features[:150].double()), labels[:150], sample_weight=weights)

    rows = scale.transform(features[150:].double())
    losses = [log_loss(labels[150:], oracle(penalty).predict_proba(rows)) for penalty in PENALTIES]
    assert l2 == PENALTIES[losses.index(min(losses))]
    assert found.loss == pytest.approx(min(losses), rel=1e-3)
    expected = torch.from_numpy(oracle(l2).predict_proba(rows)).float()
    torch.testing.assert_close(found.head(features[150:]).softmax(dim=1), expected, rtol=0, atol=2e-3)
    with pytest.raises(TooManyPasses):
        best_exact(train, val, 4, of_classes, passes=20)


def test_class_weights_weigh_a_bank_as_cross_entropy(problem):
    features, labels = problem
    weights = torch.tensor([1.0, 5.0, 0.2, 1.0])
    bank = Bank(SETTINGS[1:2], 4, 16, seed=3, device=torch.device("cpu"), class_weights=weights)
    head = bank.head(0).requires_grad_()
    functional.cross_entropy(head(features), labels, weight=weights, label_smoothing=0.1).backward()
    bank.step(features, labels, 1.0)
    first = bank.moments[0][0][0] / (1 - BETAS[0])  # after one step, the gradient
    torch.testing.assert_close(first, head.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_neighbours_vote_as_in_scikit_learn(problem):
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = problem
    parts = (slice(0, 120), slice(120, 160), slice(160, 200))
    train, val, test = (Labelled.of(features[part], labels[part]) for part in parts)
    centred = (features - features[:120].mean(dim=0)).numpy()

    def votes(distances):
        return np.clip(1 - distances, 0, None)

    def accuracy(k: int, part: slice) -> float:
        model = KNeighborsClassifier(k, metric="cosine", weights=votes).fit(centred[:120], labels[:120])
        return float(model.score(centred[part], labels[part]))

    by_k = {k: accuracy(k, parts[1]) for k in KS}
    best = max(KS, key=lambda k: by_k[k])
    wanted = {"k": best, "val/acc": by_k[best], "test/acc": accuracy(best, parts[2])}
    assert knn_scores(train, val, test, 4) == pytest.approx(wanted)
    assert knn_scores(train, val, None, 4) == pytest.approx({"k": best, "val/acc": by_k[best]})
    few = Labelled.of(features[:4], labels[:4])
    assert knn_scores(few, val, None, 4)["k"] <= 3


def test_the_best_epoch_is_kept_or_the_last(problem):
    features, labels = problem
    train, val = Labelled.of(features[:120], labels[:120]), Labelled.of(features[120:], labels[120:])
    arguments = train, val, 4, Schedule(epochs=12, batch_size=32, warmup=0.1, seed=0)
    best = train_bank([HeadSettings(0.3, 0.0, 0.0)], *arguments)[0]
    last = train_bank([HeadSettings(0.3, 0.0, 0.0)], *arguments, keep_last=True)[0]
    assert best.epoch < last.epoch == 11
    assert best.loss < last.loss
    assert score_and_loss(best.head, val) == pytest.approx((best.score, best.loss), rel=1e-5)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A problem that is not learnt to the end: half of a class looks like another."""
    root = draw(tmp_path / "mixed", images=40)
    draw(root, images=20, seed=1, colours={"red": COLOURS["green"]})
    return root


def test_the_search_ends_with_a_run_of_the_winner(mixed, capsys):
    options = [f"--data.root={mixed}", "--model.image_size=32", "--trainer.max_epochs=6", "--folds=3"]
    grid = ["--tune.lr=[0.001,0.01]", "--tune.weight_decay=[0.0,0.1]", "--tune.label_smoothing=[0.0]"]
    found = main(["tune", *options, *grid])
    assert len(found["settings"]) == 4
    assert len(found["folds"]) == 3
    accuracies = [each["val/acc"] for each in found["settings"]]
    assert accuracies == sorted(accuracies, reverse=True)
    winner = found["settings"][0]
    assert found["result"]["val/acc"] == pytest.approx(winner["val/acc"])
    assert found["result"]["val/loss"] == pytest.approx(winner["val/loss"], rel=1e-4)
    recipe = yaml.safe_load(Path(found["recipe"]).read_text())
    assert recipe == {"model": {name: winner[name] for name in ("lr", "weight_decay", "label_smoothing")}}
    folder = Path(found["recipe"]).parent
    with (folder / "heads.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "heads.csv", "winner.yaml"}
    assert "test/acc" in found["exact"]
    assert found["knn"]["k"] >= 1
    assert found["knn"]["test/acc"] > 0.5
    out = capsys.readouterr().out
    assert "L-BFGS" in out
    assert f"k-NN:     k {found['knn']['k']}, val/acc {found['knn']['val/acc']:.3f}" in out
    assert "+-" in out


def test_draws_lie_between_the_ends_of_the_grid(mixed):
    options = [f"--data.root={mixed}", "--model.image_size=32", "--trainer.max_epochs=1", "--tune.draws=7"]
    found = main(["tune", *options, "--tune.lr=[0.001,0.1]"])
    assert len(found["settings"]) == 7
    assert len({each["lr"] for each in found["settings"]}) == 7
    assert all(0.001 <= each["lr"] <= 0.1 for each in found["settings"])
    assert all(0 <= each["weight_decay"] <= 1 for each in found["settings"])


TRIED = [("resnet18", "random"), ("timm/test_resnet", "random")]


def test_backbones_are_compared_on_the_same_images(mixed, capsys, monkeypatch):
    trials = []
    monkeypatch.setattr("headstart.verbs.tune.best_of", lambda found: trials.extend(found) or best_of(found))
    options = [f"--data.root={mixed}", "--model.image_size=32", "--trainer.max_epochs=3", "--folds=2", "--tune.draws=2"]
    found = main(["tune", *options, "--backbones=" + ",".join("@".join(named) for named in TRIED)])
    rows, out = found["backbones"], capsys.readouterr().out
    assert [(row["backbone"], row["weights"]) for row in rows] == TRIED
    assert [(row["width"], round(row["parameters"], 1)) for row in rows] == [(512, 11.2), (96, 0.4)]
    assert [row["licence"] for row in rows] == [None, "apache-2.0"]
    assert all(row["milliseconds"] > 0 and row["seconds"] > 0 for row in rows)
    assert out.count("┃ class") == 2  # the images are counted once, and once more by the final run

    data = ImageFolderData(str(mixed))
    right = []
    for trial, named in zip(trials, TRIED, strict=True):
        data.load(FrozenBackbone(*named, image_size=32), torch.device("cpu"))
        head = trial.heads.best.head
        logits = {split: head(data.labelled(split).views[0].whole()).detach().numpy() for split in ("val", "test")}
        right.append({split: logits[split].argmax(axis=1) == data.labels(split).numpy() for split in logits})
    for row, own in zip(rows, right, strict=True):
        for split in ("val", "test"):
            difference = own[split].astype(float) - right[0][split]
            error = difference.std(ddof=1) / len(difference) ** 0.5
            assert row[f"{split}/acc"] == pytest.approx(own[split].mean())
            assert row[f"{split}/difference"] == pytest.approx(difference.mean())
            assert row[f"{split}/half_width"] == pytest.approx(stats.t.ppf(0.975, len(difference) - 1) * error)

    winner = best_of(trials)
    assert winner.heads.best.score == max(row["val/acc"] for row in rows)
    recipe = Path(found["recipe"])
    assert yaml.safe_load(recipe.read_text())["model"] == {
        "backbone": winner.backbone,
        "weights": winner.weights,
        **{name: found["settings"][0][name] for name in ("lr", "weight_decay", "label_smoothing")},
    }
    plain = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert rows_of(recipe.parent / "backbones.csv") == plain
    made = yaml.safe_load((newest_run(Path("logs")) / "config.yaml").read_text())["model"]
    assert (made["backbone"], made["weights"]) == (winner.backbone, winner.weights)
    assert len(found["folds"]) == 2
    assert found["result"]["val/acc"] == pytest.approx(found["settings"][0]["val/acc"])


def trial(acc: float, loss: float, test: float) -> Trial:
    head = TrainedHead(torch.nn.Linear(1, 2), acc, loss)
    right = {"val": torch.tensor([acc, acc]), "test": torch.tensor([test, test])}
    return Trial("some", "random", Heads([(SETTINGS[0], head)], head, {}), right, "acc", 1.0, 1, 1.0, None, 1.0)


def test_the_test_never_chooses_the_backbone():
    trials = [trial(0.7, 0.9, 0.9), trial(0.8, 0.9, 0.5), trial(0.8, 0.8, 0.1), trial(0.8, 0.8, 1.0)]
    assert best_of(trials) is trials[2]


def test_images_that_change_during_the_comparison_stop_it(colours):
    data, device = ImageFolderData(str(colours)), torch.device("cpu")
    first = FrozenBackbone(weights="random", image_size=32)
    data.load(first, device)

    def fit_heads() -> Heads:
        next(colours.glob("red/*")).unlink()
        head = TrainedHead(torch.nn.Linear(data.store.backbone.num_features, 3), 1.0, 0.0)
        return Heads([(SETTINGS[0], head)], head, {})

    with pytest.raises(UserError, match="the images changed"):
        compare(data, [first, FrozenBackbone("timm/test_resnet", "random", 32)], device, fit_heads)


@pytest.mark.parametrize(
    ("backbones", "said"),
    [
        ("", "give names"),
        ("resnet18,", "give names"),
        ("resnet18@", "give names"),
        ("resnet18,lenet", "no such backbone"),
        ("resnet18@random,resnet18@random", "is given twice"),
        ("resnet18,resnet18@bundled", "is given twice"),
        ("resnet18,resnet18@missing.pth", "missing.pth"),
    ],
)
def test_a_mistake_in_the_backbones_is_one_line_before_any_work(backbones, said, colours, own_cache, refused):
    line = refused("tune", f"--data.root={colours}", "--model.image_size=32", f"--backbones={backbones}")
    assert said in line
    assert line.split(": ")[1].startswith("--backbones")
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--tune.lr=[-1]", "--tune.lr"),
        ("--folds=1", "give 2 or more"),
        ("--folds=50", "a fold has no image"),
        ("--model.head=mlp", "the search trains linear heads only"),
        ("--data.cache=false", "leave the cache on"),
        ("--tune.lrs=[1]", "did you mean --tune.lr?"),
    ],
)
def test_a_mistake_in_the_search_is_one_line(option, said, colours, refused):
    assert said in refused("tune", f"--data.root={colours}", "--model.image_size=32", option)


@pytest.mark.fault("images of one group in several folds")
def test_images_of_a_group_share_a_fold():
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(60)]
    alone = [Item(f"{number}", 0, digest) for number, digest in enumerate(digests)]
    assert folds_of(alone, 3) == [digest[-1] % 3 for digest in digests]
    grouped = [replace(item, group=f"scene {number // 4}") for number, item in enumerate(alone)]
    grouped.append(replace(grouped[0], path="copy", group="scene 14"))  # joins two groups by its content
    found = folds_of(grouped, 3)
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 60, 4))
    assert found[60] == found[0] == found[56]
    assert set(found) == {0, 1, 2}
