import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from headstart.cli import main
from headstart.data.table import read_table
from headstart.features.matrix import FeatureMatrix
from headstart.label.choose import choose
from headstart.search.knn import nearest
from support import COLOURS, TINY, draw, rows_of

SIZES = (100, 60, 30)


@pytest.fixture
def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Three groups of rows, far from one another, and the group of each."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    return 4 * functional.one_hot(truth, 16) + 0.5 * torch.randn(len(truth), 16, generator=generator), truth


def test_without_labels_each_cluster_gives_its_most_typical_row_the_largest_first(blobs):
    features, truth = blobs
    chosen = choose(features, torch.full_like(truth, -1), 3, 0, None)
    assert truth[chosen].tolist() == [0, 1, 2]
    unit = functional.normalize(features - features.mean(dim=0), dim=1)
    for group, row in enumerate(chosen.tolist()):
        inside = unit[truth == group]
        typicality = (inside @ inside.T).topk(21).values[:, 1:].mean(dim=1)
        assert row == int((truth == group).nonzero()[typicality.argmax()])
    assert torch.equal(chosen, choose(features, torch.full_like(truth, -1), 3, 0, None))


@pytest.mark.parametrize("known", [0, 1, 2, 190])
def test_all_can_be_chosen_none_twice_and_none_that_is_known(blobs, known):
    features, truth = blobs
    labels = torch.full_like(truth, -1)
    if known:
        labels[torch.linspace(0, 189, known).long()] = truth[torch.linspace(0, 189, known).long()]
    count = int((labels < 0).sum())
    chosen = choose(features, labels, count, 0, None)
    assert sorted(chosen.tolist()) == (labels < 0).nonzero()[:, 0].tolist()


def test_with_labels_what_they_do_not_cover_comes_first(blobs):
    features, truth = blobs
    labels = torch.full_like(truth, -1)
    labels[[0, 1, 100, 101]] = truth[[0, 1, 100, 101]]
    assert truth[choose(features, labels, 1, 0, None)].tolist() == [2]


def test_a_head_that_is_sure_of_a_group_leaves_it_for_last(blobs):
    features, truth = blobs
    unsure = functional.one_hot(truth, 3).float()
    unsure[truth == 1] = 1 / 3
    chosen = choose(features, torch.full_like(truth, -1), SIZES[1], 0, lambda _: unsure)
    assert set(truth[chosen].tolist()) == {1}


def test_among_many_rows_it_chooses_from_samples(blobs, monkeypatch):
    from headstart.label import choose as module

    features, truth = blobs
    labels = torch.full_like(truth, -1)
    labels[[0, 100]] = truth[[0, 100]]
    monkeypatch.setattr(module, "SAMPLE", 50)
    monkeypatch.setattr(module, "PER_SAMPLE", 7)
    chosen = choose(features, labels, 40, 0, None)
    assert len(set(chosen.tolist())) == 40


@pytest.mark.parametrize("block", [7, 2048])
def test_the_nearest_rows_are_those_of_brute_force(block, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.rand(60, 8, generator=generator), torch.rand(5, 8, generator=generator)
    monkeypatch.setattr("headstart.search.knn.ROWS_AT_ONCE", block)
    similarities, numbers = nearest(queries, FeatureMatrix.of(rows), 9)
    centred = (functional.normalize(each - rows.mean(dim=0), dim=1) for each in (queries, rows))
    wanted = torch.mm(next(centred), next(centred).T).topk(9)
    assert torch.equal(numbers, wanted.indices)
    assert torch.allclose(similarities, wanted.values, atol=1e-6)
    assert nearest(queries, FeatureMatrix.of(rows), 100)[1].shape == (5, 60)


def test_next_writes_a_list_that_can_be_trained_on_once_it_is_labelled(tmp_path, capsys):
    heap = draw(tmp_path / "heap", images=6)
    (heap / "copy.png").write_bytes((heap / "red/000.png").read_bytes())
    options = [f"--data.root={heap}", *TINY]
    assert main(["next", *options, "--n=6", "--output=lists/first.csv"]) == {"images": 18, "labelled": 0, "chosen": 6}
    rows = rows_of(Path("lists/first.csv"))
    assert {row["label"] for row in rows} == {""}
    pictures = [Path("lists", row["path"]) for row in rows]
    assert all(path.is_file() for path in pictures)
    assert {path.parent.name for path in pictures} >= set(COLOURS)
    lines = [f"{row['path']},{Path(row['path']).parent.name}" for row in rows]
    Path("lists/labels.csv").write_text("\n".join(["path,label", *lines]))
    assert read_table(Path("lists/labels.csv"))[0] == sorted(COLOURS)

    found = main(["next", *options, "--labels=lists/labels.csv", "--n=100"])
    assert found == {"images": 18, "labelled": 6, "chosen": 12}
    more = {os.path.normpath(row["path"]) for row in rows_of(Path("next.csv"))}
    assert len(more) == 12
    assert not more & {os.path.relpath(path) for path in pictures}
    assert "headstart label --data.root=" in capsys.readouterr().out


def test_the_features_and_the_doubt_of_a_checkpoint(checkpoint, trained):
    options = [f"--ckpt_path={checkpoint}", f"--data.root={trained / 'colours'}", "--n=5"]
    assert main(["next", *options]) == {"images": 60, "labelled": 0, "chosen": 5}


def test_what_next_cannot_do_is_refused(tmp_path, refused):
    heap = draw(tmp_path / "heap", images=1)
    options = "next", f"--data.root={heap}", *TINY
    assert "--data.root is missing" in refused("next")
    (tmp_path / "nothing").mkdir()
    assert "contains no images" in refused("next", f"--data.root={tmp_path / 'nothing'}")
    Path("next.csv").write_text("mine")
    assert "already exists" in refused(*options)
    assert Path("next.csv").read_text() == "mine"
    wrong = {"": "contains no label", "heap/red/000.png,": "line 2: no label", "a,b\na,c": "listed twice"}
    for row, said in wrong.items():
        Path("labels.csv").write_text(f"path,label\n{row}")
        assert said in refused(*options, "--labels=labels.csv", "--output=other.csv")
