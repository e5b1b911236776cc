"""One domain left out: what is trained, what is tested, and which images are new."""

import csv

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from headstart.cli import main
from headstart.data.splits import Item
from headstart.domains.leave_out import balanced, leave_one_out
from headstart.errors import UserError
from headstart.features.matrix import FeatureMatrix
from headstart.search.exact import PENALTIES
from support import TINY, draw, newest_run

SPLITS = ("train", "train", "val", "test")


@pytest.fixture
def problem():
    """Images of three classes in three domains of different sizes, each shifted, and their features by digest."""
    generator = torch.Generator().manual_seed(0)
    centres, shifts = torch.randn(3, 6, generator=generator), 2 * torch.randn(3, 6, generator=generator)
    items, features = [], {}
    for domain, count in enumerate((24, 36, 60)):
        for number in range(count):
            label, digest = number % 3, bytes([domain, number])
            items.append(Item(f"{domain}/{number}", label, digest, SPLITS[number // 3 % 4], domain=f"d{domain}"))
            noise = torch.randn(6, generator=generator)
            features[digest] = centres[label] + shifts[domain] + noise
    return items, features


def left_out(items, features, balance=False):
    def matrix(wanted):
        return FeatureMatrix.of(torch.stack([features[item.digest] for item in wanted]))

    return leave_one_out(items, ["a", "b", "c"], matrix, balance, lambda count: None)


@pytest.mark.parametrize("balance", [False, True])
def test_it_is_the_plain_loop_of_scikit_learn(problem, balance):
    items, features = problem
    for found in left_out(items, features, balance):
        train = [item for item in items if item.split == "train" and item.domain != found.domain]
        rows, labels = torch.stack([features[item.digest] for item in train]), [item.label for item in train]
        weights = balanced(train) * len(train) / balanced(train).sum() if balance else None
        scale = StandardScaler().fit(rows.double())
        head = LogisticRegression(C=1 / (found.l2 * len(train)), max_iter=5000, tol=1e-8)
        head.fit(scale.transform(rows.double()), labels, sample_weight=weights)
        new = [item for item in items if item.domain == found.domain]
        expected = head.predict_proba(scale.transform(torch.stack([features[item.digest] for item in new]).double()))
        torch.testing.assert_close(found.unseen.probabilities.double(), torch.from_numpy(expected), atol=2e-3, rtol=0)
        truth = [item.label for item in new]
        assert found.unseen.auroc == pytest.approx(roc_auc_score(truth, expected, multi_class="ovr"), abs=2e-3)
        assert found.l2 in PENALTIES
        assert {item.domain for item in found.seen.items} == {f"d{n}" for n in range(3)} - {found.domain}
        assert all(item.split == "test" for item in found.seen.items)


def test_domains_weigh_the_same_whatever_their_size(problem):
    items = problem[0]
    weights = balanced(items)
    sums = [sum(float(w) for item, w in zip(items, weights, strict=True) if item.domain == f"d{n}") for n in range(3)]
    assert sums == pytest.approx([1, 1, 1])


def test_an_image_or_a_group_of_two_domains_trains_no_head_that_meets_it(problem):
    items, features = problem
    twin, grouped = items[0], items[-1]
    items = [*items, Item("copy", twin.label, twin.digest, "train", domain="d1")]
    items = [Item(i.path, i.label, i.digest, i.split, "scene" if i is grouped else "", i.domain) for i in items]
    items[30] = Item("other", items[30].label, items[30].digest, "train", "scene", "d1")
    first, second, third = left_out(items, features)
    plain = [sum(i.split == "train" and i.domain != name for i in items) for name in ("d0", "d1", "d2")]
    assert (first.trained, second.trained) == (plain[0] - 1, plain[1] - (twin.split == "train"))
    assert third.trained == plain[2] - 1


def test_what_cannot_be_left_out_is_one_line(problem):
    items, features = problem
    with pytest.raises(UserError, match="all images are of one domain"):
        left_out([item for item in items if item.domain == "d0"], features)
    with pytest.raises(UserError, match="24 images have no domain"):
        left_out([Item(i.path, i.label, i.digest, i.split, "", i.domain.replace("d0", "")) for i in items], features)
    with pytest.raises(UserError, match="without 'd2' no training image of class 'b' is left"):
        left_out([item for item in items if item.label != 1 or item.domain == "d2"], features)


def test_the_command_scores_each_domain_and_draws_their_curves(tmp_path, capsys, refused):
    for seed, name in enumerate(("photo", "sketch")):
        draw(tmp_path / "world" / name, images=8, seed=seed)
    rows = main(["domains", f"--data.root={tmp_path / 'world'}", *TINY])
    assert [row["domain"] for row in rows] == ["photo", "sketch"]
    folder = newest_run()
    with (folder / "domains.csv").open(newline="") as file:
        assert [float(row["acc"]) for row in csv.DictReader(file)] == [row["acc"] for row in rows]
    assert (folder / "roc.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "the worst is" in out
    assert str(folder / "domains.csv") in out.replace("\n", "")
    assert "all images are of one domain" in refused(
        "domains", f"--data.root={tmp_path / 'world/photo'}", "--data.source=folder", *TINY
    )
