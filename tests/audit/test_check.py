import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headstart.audit.findings import near_groups
from headstart.audit.labels import _folds, losses, out_of_fold
from headstart.cli import main
from headstart.search.neighbours import neighbours, rooted
from support import draw, newest_run


def findings() -> list[dict[str, str]]:
    with (newest_run() / "check.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def paths(kind: str) -> list[str]:
    return [row["path"] for row in findings() if row["problem"] == kind]


def check(root: Path) -> dict[str, int]:
    counts: dict[str, int] = main(["check", f"--data.root={root}", "--model.image_size=64"])
    return counts


@pytest.fixture
def photos(tmp_path) -> Path:
    """Classes of unlike images: coloured blocks at random, more of one colour a class."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(24):
            blocks = random.integers(0, 256, (6, 6, 3))
            blocks[..., 2 - label] = 255
            Image.fromarray(blocks.astype(np.uint8)).resize((96, 96), 0).save(
                tmp_path / "photos" / name / f"{number:03}.png"
            )
    return tmp_path / "photos"


def test_a_sound_folder_has_no_duplicates_and_nothing_is_changed(photos):
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    counts = check(photos)
    assert counts["damaged"] == counts["duplicate"] == counts["near-duplicate"] == counts["small class"] == 0
    assert {path: path.read_bytes() for path in photos.rglob("*.png")} == before
    assert len(findings()) == sum(counts.values())


def test_copies_are_found_in_groups_with_splits_and_classes(photos):
    original = photos / "red/001.png"
    (photos / "red/copy.png").write_bytes(original.read_bytes())
    (photos / "green/copy.png").write_bytes(original.read_bytes())
    with Image.open(photos / "blue/002.png") as image:
        image.convert("RGB").save(photos / "blue/again.jpg", quality=85)
    counts = check(photos)
    assert counts["duplicate"] == 3
    assert set(paths("duplicate")) == {"red/001.png", "red/copy.png", "green/copy.png"}
    assert {"blue/002.png", "blue/again.jpg"} <= set(paths("near-duplicate"))
    rows = [row for row in findings() if row["problem"] == "near-duplicate"]
    group = {row["group"] for row in rows if row["path"].startswith("blue/")}
    assert len(group) == 1
    assert "in 2 classes: green, red" in next(row["note"] for row in findings() if row["problem"] == "duplicate")
    page = (newest_run() / "check.html").read_text()
    together = page[page.index("in 2 classes: green, red") :][:60_000]
    assert all(f'alt="{path}"' in together for path in ("green/copy.png", "red/001.png", "red/copy.png"))
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_wrong_labels_come_first(tmp_path):
    folder = draw(tmp_path / "photos", images=30)
    for number, (wrong, right) in enumerate([("red", "blue"), ("green", "red"), ("blue", "green")]):
        (folder / right / f"{number:03}.png").rename(folder / wrong / f"moved{number}.png")
    check(folder)
    assert set(paths("label")[:3]) == {"red/moved0.png", "green/moved1.png", "blue/moved2.png"}
    note = next(row["note"] for row in findings() if row["path"] == "red/moved0.png" and row["problem"] == "label")
    assert note.startswith("looks like blue")
    page = (newest_run() / "check.html").read_text()
    beside = page[page.index('alt="red/moved0.png"') :].split("</div>")[0]
    assert beside.count("near: blue") >= 3
    assert beside.count("<img") == 5  # its neighbours


def test_an_image_unlike_all_others_is_found(tmp_path):
    folder = draw(tmp_path / "photos", images=30)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[::4] = 255
    Image.fromarray(stripes).save(folder / "red" / "stripes.png")
    check(folder)
    assert paths("outlier")[0] == "red/stripes.png"


def test_damaged_files_and_small_classes_are_findings_and_stop_nothing(photos, capsys):
    (photos / "tiny").mkdir()
    Image.new("RGB", (64, 64), "white").save(photos / "tiny/1.png")
    for number in range(9):
        (photos / "red" / f"bad{number}.png").write_bytes(b"no image")
    counts = check(photos)
    assert counts["damaged"] == 9
    assert counts["small class"] == 1
    assert paths("small class") == ["tiny"]
    assert "train:    would stop" in capsys.readouterr().out


def test_a_folder_of_nothing_readable_is_refused(tmp_path, refused):
    for name in ("a", "b"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        (tmp_path / "bad" / name / "1.png").write_bytes(b"")
    assert "no readable image" in refused("check", f"--data.root={tmp_path / 'bad'}")
    assert "either --data.root" in refused("check")


def test_groups_stay_in_one_fold_and_folds_are_even():
    labels = torch.arange(60) % 3
    groups = torch.arange(60)
    groups[[7, 9, 30]] = 7
    folds = _folds(labels, groups, seed=1)
    assert len({int(folds[position]) for position in (7, 9, 30)}) == 1
    assert torch.bincount(folds).min() >= 10


def test_probabilities_come_from_heads_that_did_not_see_the_image():
    """With random labels nothing can be known of an image; a head that saw it would know."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(100, 200, generator=generator)
    labels = torch.randint(0, 2, (100,), generator=generator)
    found = out_of_fold(rooted(features), labels, 2, torch.arange(100))
    assert losses(found, labels).mean() > 0.65


def test_neighbours_join_chains_and_skip_identical_contents():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 64, generator=generator)
    features[10] = features[11] + 0.01
    features[12] = features[10] * 1.02
    features[20] = features[21]
    digests = [bytes([number]) for number in range(50)]
    digests[20] = digests[21]
    found = neighbours(features, digests, k=5, threshold=0.9)
    assert near_groups(found.pairs, digests) == [[10, 11, 12]]
    assert found.similarities.shape == (50, 5)
    assert found.similarities[20, 0] < 0.9
