"""Splits, folders and datasets."""

import csv
import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headstart import DatasetData, FrozenBackbone, ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.data.loaders import BatchOrder
from headstart.data.splits import Item, assign, shared_between_splits
from headstart.device import quiet_trainer
from headstart.errors import UserError
from support import COLOURS, RESNET18, draw, newest_run


def items(count: int, labels: int = 2, prefix: bytes = b"") -> list[Item]:
    return [Item(f"{i}", i % labels, prefix + i.to_bytes(4, "big")) for i in range(count)]


def splits_of(found: list[Item]) -> dict[bytes, str]:
    return {item.digest: str(item.split) for item in found}


def test_a_new_image_never_moves_an_old_one():
    before = splits_of(assign(items(500), ["a", "b"], 0.15, 0.15, seed=0))
    after = splits_of(assign(items(500) + items(300, prefix=b"new"), ["a", "b"], 0.15, 0.15, seed=0))
    assert all(after[digest] == split for digest, split in before.items())
    assert len(after) == 800


def test_the_fractions_hold_and_another_seed_is_another_split():
    counts = Counter(splits_of(assign(items(4000), ["a", "b"], 0.15, 0.15, seed=0)).values())
    assert counts["test"] == pytest.approx(600, abs=70)
    assert counts["val"] == pytest.approx(600, abs=70)
    first, second = (splits_of(assign(items(100), ["a", "b"], 0.15, 0.15, seed)) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_in_every_split(seed):
    found = assign(items(9, labels=3), ["a", "b", "c"], 0.15, 0.15, seed)
    assert Counter((item.label, item.split) for item in found) == {
        (label, split): 1 for label in range(3) for split in ("train", "val", "test")
    }


def test_identical_images_share_a_split():
    twins = [Item(f"{copy}{i}", copy, i.to_bytes(4, "big")) for i in range(40) for copy in range(2)]
    for seed in range(20):
        assert shared_between_splits(assign(twins, ["a", "b"], 0.15, 0.15, seed)) == 0


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return [index for batch in BatchOrder(100, 32, seed, lambda: epoch) for index, _ in batch]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(order(5, 0)) == list(range(100))


@pytest.mark.parametrize("size", [64, 65, 100, 101])
def test_ranks_share_without_overlap(size):
    evaluated = [BatchOrder(size, 32, None, int, rank, 2) for rank in range(2)]
    seen = sorted(index for order in evaluated for batch in order for index, _ in batch)
    assert seen == list(range(size))
    trained = [BatchOrder(size, 32, 0, int, rank, 2) for rank in range(2)]
    sizes = [[len(batch) for batch in order] for order in trained]
    assert sizes[0] == sizes[1]
    assert len(trained[0]) == len(sizes[0])
    both = [index for order in trained for batch in order for index, _ in batch]
    assert len(set(both)) == len(both) == size - size % 2


def setup(data: ImageFolderData) -> ImageFolderData:
    data.load(FrozenBackbone(weights="random", image_size=32), torch.device("cpu"))
    return data


@pytest.mark.fault("root with train/ and val/")
def test_folders_of_ready_splits_are_used_as_they_are(tmp_path, train):
    for split, count, seed in (("train", 12, 0), ("valid", 4, 1), ("test", 5, 2)):
        draw(tmp_path / "data" / split, images=count, seed=seed)
    result = train(tmp_path / "data", *RESNET18, "--trainer.max_epochs=8")
    assert result["images"] == {"train": 36, "val": 12, "test": 15}
    assert result["test/acc"] == 1.0


def test_without_a_test_folder_validation_is_reported_as_such(tmp_path, train, capsys):
    for split, count, seed in (("train", 12, 0), ("val", 4, 1)):
        draw(tmp_path / "data" / split, images=count, seed=seed)
    result = train(tmp_path / "data", "--trainer.max_epochs=3", "--report=true")
    assert result["images"] == {"train": 36, "val": 12, "test": 0}
    assert "test/acc" not in result
    assert "val/acc" in result
    assert "also chose the epoch" in capsys.readouterr().out
    events = EventAccumulator(str(newest_run()))
    events.Reload()
    assert len(events.Scalars("val/acc")) == 3
    assert "val/confusion_matrix" in events.Tags()["images"]


def test_without_a_val_folder_train_is_split(tmp_path):
    for split, count, seed in (("train", 20, 0), ("test", 5, 2)):
        draw(tmp_path / "data" / split, images=count, seed=seed)
    data = setup(ImageFolderData(str(tmp_path / "data")))
    counts = Counter(item.split for item in data.items)
    assert counts["test"] == 15
    assert counts["train"] + counts["val"] == 60
    assert all(item.path.startswith("test/") == (item.split == "test") for item in data.items)


@pytest.mark.fault("the same image in two splits")
def test_an_image_in_two_splits_is_said(tmp_path, capsys):
    for split, seed in (("train", 0), ("val", 1), ("test", 2)):
        draw(tmp_path / "data" / split, images=5, seed=seed)
    shutil.copy(tmp_path / "data/train/red/000.png", tmp_path / "data/test/red/copy.png")
    setup(ImageFolderData(str(tmp_path / "data")))
    assert "1 images are in more than one split" in capsys.readouterr().out


def test_a_splits_file_freezes_the_split(colours, train, tmp_path):
    train(colours, "--trainer.max_epochs=1", "--data.split_seed=5")
    frozen = newest_run() / "splits.csv"
    draw(colours, images=3, seed=9, colours={"red": COLOURS["red"]})  # three others under the old names
    (colours / "green/000.png").rename(colours / "green/renamed.png")
    train(colours, "--trainer.max_epochs=1", f"--data.splits={frozen}")
    with frozen.open() as old, (newest_run() / "splits.csv").open() as new:
        before = {row["sha256"]: row["split"] for row in csv.DictReader(old)}
        after = {row["sha256"]: row["split"] for row in csv.DictReader(new)}
    assert len(after) == 57
    assert all(before[digest] == split for digest, split in after.items())


@pytest.mark.fault(
    "truncated JPEG",
    "empty file, or text in its place",
    "blanks, line breaks and Unicode in names",
    "hidden files",
    "folders made by tools, such as .ipynb_checkpoints",
    "broken symbolic link",
)
@pytest.mark.parametrize("cache", [True, False])
def test_what_cannot_be_read_is_left_out_and_listed(cache, colours, train, capsys):
    (colours / "red/000.png").write_bytes(b"")
    (colours / "red/001.png").write_bytes((colours / "red/002.png").read_bytes()[:200])
    (colours / "blue/a b\nü.png").write_text("<html>")
    (colours / "green/link.png").symlink_to("nowhere.png")
    (colours / "green/._x.jpg").write_text("hidden")
    (colours / "green/notes.txt").write_text("mine")
    (colours / ".ipynb_checkpoints").mkdir()
    (colours / "green/Nested").mkdir()
    shutil.move(colours / "green/003.png", colours / "green/Nested/003.PNG")
    result = train(colours, "--trainer.max_epochs=1", f"--data.cache={str(cache).lower()}", "--data.num_workers=0")
    assert result["skipped"] == 4
    assert sum(result["images"].values()) == 58
    with (newest_run() / "skipped.csv").open(newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons["red/000.png"] == "empty file"
    assert reasons["red/001.png"].startswith("damaged")
    assert reasons["blue/a b\nü.png"] == "not an image"
    assert reasons["green/link.png"] == "missing, or a broken symbolic link"
    out = capsys.readouterr().out
    assert "1 .txt" in out
    assert "skipped.csv" in out


@pytest.mark.fault("empty file, or text in its place")
def test_too_many_unreadable_images_stop_the_run(colours, refused):
    for number in range(6):
        (colours / f"red/00{number}.png").write_bytes(b"")
    line = refused("train", f"--data.root={colours}", "--model.image_size=32")
    assert "6 of 60 images cannot be read" in line
    assert not Path("logs").exists()


def break_(colours: Path, how: str) -> None:
    if how == "one class":
        shutil.rmtree(colours / "red")
        shutil.rmtree(colours / "blue")
    elif how == "images in the root":
        for name in COLOURS:
            (colours / name / "000.png").rename(colours / f"{name}.png")
            shutil.rmtree(colours / name)
    elif how == "empty class":
        (colours / "empty").mkdir()
    elif how == "two images":
        for path in sorted((colours / "red").iterdir())[2:]:
            path.unlink()
    elif how == "classes differ":
        for split in ("train", "val"):
            draw(colours / split, images=4)
        (colours / "val/extra").mkdir()


@pytest.mark.fault(
    "only one class",
    "images directly in the root",
    "class folder without images",
    "class with one image",
    "different classes in train and val",
)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("one class", "at least 2"),
        ("images in the root", "/cat/1.jpg"),
        ("empty class", "'empty'"),
        ("two images", "'red': 2 different image(s)"),
        ("classes differ", "extra"),
    ],
)
def test_folders_that_cannot_be_trained_on(how, said, colours, refused):
    break_(colours, how)
    assert said in refused("train", f"--data.root={colours}", "--model.image_size=32")


def test_a_limit_is_a_prefix_of_the_training_images(colours):
    small, large = (setup(ImageFolderData(str(colours), limit=limit)) for limit in (3, 6))
    assert small.counts("train").tolist() == [3, 3, 3]
    assert {i.path for i in small.items_in("train")} < {i.path for i in large.items_in("train")}
    assert small.items_in("test") == large.items_in("test")


@pytest.mark.fault("file that vanishes or changes during the run")
def test_a_file_that_changes_during_the_run_is_named(colours):
    data = setup(ImageFolderData(str(colours), cache=False, num_workers=0))
    victim = data.items_in("train")[0]
    read = data.store.read
    draw(colours, images=20, seed=4)
    with pytest.raises(UserError, match=victim.path):
        read(victim)
    (colours / victim.path).unlink()
    with pytest.raises(UserError, match="vanished"):
        read(victim)


def test_another_backbone_never_gets_the_features_of_the_one_before(colours):
    data = setup(ImageFolderData(str(colours)))
    before = data.labelled("train").views[0].whole()
    data.load(FrozenBackbone(weights="bundled", image_size=32), torch.device("cpu"))
    assert not torch.allclose(before, data.labelled("train").views[0].whole(), atol=0.1)


class Squares(torch.utils.data.Dataset):
    """What a user brings: pairs of a PIL image and a label."""

    classes = ("dark", "light")

    def __init__(self, count: int, seed: int) -> None:
        self.random, self.count = np.random.default_rng(seed), count
        self.images = [
            Image.fromarray(self.random.integers(0, 100, (40, 40, 3)).astype(np.uint8) + (i % 2) * np.uint8(150))
            for i in range(count)
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], index % 2


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_any_dataset_of_images_and_labels(ready, cache):
    options = {"val": Squares(10, 1), "test": Squares(10, 2)} if ready else {}
    data = DatasetData(Squares(40, 0), **options, cache=cache, num_workers=0)
    model = TransferClassifier(data.class_names, image_size=32, lr=0.02)
    trainer = Trainer(
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=data)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test/acc"] == 1.0
    assert len(data.items) == (60 if ready else 40)


class Palettes(Squares):
    """Images of the same indices into other colours."""

    def __getitem__(self, index):
        image = Image.new("P", (40, 40), 1)
        image.putpalette([0, 0, 0, index, 255 * (index % 2), 0])
        return image, index % 2


@pytest.mark.fault("images of a dataset that differ only by palette, transparency or orientation")
def test_images_of_a_dataset_that_differ_by_palette_have_rows_of_their_own():
    data = setup(DatasetData(Palettes(40, 0), num_workers=0))
    assert len({item.digest for item in data.items}) == 40
    rows = data.store.matrix(data.store.items).whole()
    assert len(rows.unique(dim=0)) == 40


def test_a_damaged_image_of_a_dataset_is_left_out():
    class OneDamaged(Squares):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            file = io.BytesIO()
            image.save(file, "PNG")
            return Image.open(io.BytesIO(file.getvalue()[: 60 if index == 3 else None])), label

    data = setup(DatasetData(OneDamaged(40, 0), num_workers=0))
    assert len(data.items) == 39
    assert data.store.skipped["train/3"].startswith("damaged")


def deep_squares(folder: Path, largest: int) -> Path:
    """Gray images of 16 bits whose classes differ by brightness, as a camera writes them."""
    random = np.random.default_rng(0)
    for name, share in (("dark", 0.3), ("light", 0.8)):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            values = largest * share * random.uniform(0.8, 1, (40, 40))
            values[0, 0] = largest
            Image.fromarray(values.astype(np.uint16)).save(folder / name / f"{number:02}.png")
    return folder


@pytest.mark.fault("10 to 14 bits in 16, and 32 bits")
def test_a_data_set_of_12_bits_has_one_scale_which_the_checkpoint_keeps(tmp_path, train, capsys):
    folder = deep_squares(tmp_path / "camera", 4095)
    assert train(folder, *RESNET18, "--trainer.max_epochs=8")["test/acc"] == 1.0
    assert "values up to 4095; 4095 becomes white" in capsys.readouterr().out
    best = newest_run() / "checkpoints/best.ckpt"
    module = TransferClassifier.load_from_checkpoint(best)
    assert module.backbone.preprocessing.bits == 12
    with Image.open(folder / "light/00.png") as image:
        assert module.predict(image).argmax() == 1
    # The checkpoint's scale stays, whatever the values of the images that it is evaluated on.
    other = deep_squares(tmp_path / "darker", 1000)
    main(["evaluate", f"--ckpt_path={best}", f"--data.root={other}", "--report=false"])
    assert "values up to 1000; 4095 becomes white" in capsys.readouterr().out
    train(folder, *RESNET18, "--trainer.max_epochs=9", f"--ckpt_path={best.with_name('last.ckpt')}", "--name=longer")
    resumed = newest_run(Path("logs")) / "checkpoints/last.ckpt"
    assert torch.load(resumed, weights_only=True)["headstart"]["preprocessing"]["bits"] == 12


def test_data_without_a_trainer_says_what_it_needs(colours):
    with pytest.raises(UserError, match="Trainer"):
        ImageFolderData(str(colours)).setup("fit")


def listed(folder: Path, rows: list[tuple[str, ...]], columns: str = "path,label") -> Path:
    file = folder / "list.csv"
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([columns.split(","), *rows])
    return file


@pytest.fixture
def bursts(tmp_path) -> list[tuple[str, str, str]]:
    """Images in one flat folder, ten scenes a class, of three images each: path, label, group."""
    draw(tmp_path / "drawn", images=30)
    (tmp_path / "flat").mkdir()
    rows = []
    for name in COLOURS:
        for number in range(30):
            shutil.copy(tmp_path / f"drawn/{name}/{number:03}.png", tmp_path / f"flat/{name}, {number}.png")
            rows.append((f"flat/{name}, {number}.png", name, f"{name} {number // 3}"))
    return rows


def test_a_list_of_images_trains_and_its_groups_keep_together(bursts, tmp_path, train, monkeypatch):
    file = listed(tmp_path, bursts, "path,label,group")
    result = main(["train", f"--data.csv={file}", "--model.image_size=32", "--report=false", "--trainer.max_epochs=8"])
    assert result["test/acc"] == 1.0
    run = newest_run()
    assert run.parent.name == "list"
    group = {path: group for path, _, group in bursts}
    splits: dict[str, set[str]] = {}
    with (run / "splits.csv").open(newline="") as text:
        for row in csv.DictReader(text):
            splits.setdefault(group[row["path"]], set()).add(row["split"])
    assert len(splits) == 30
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}
    best = run / "checkpoints/best.ckpt"
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["test/acc"] == 1.0
    assert main(["evaluate", f"--ckpt_path={best}", f"--data.csv={file}", "--report=false"])["images"]["test"] == 90
    assert main(["export", f"--ckpt_path={best}", "--output=flat.pth"])["images"] == 32  # wing: deploy
    assert main(["check", f"--data.csv={file}"])["damaged"] == 0  # wing: audit
    tuned = main(["finetune", f"--ckpt_path={best}", "--report=false", "--trainer.max_epochs=1"])  # wing: finetune
    assert tuned["before/test/acc"] == 1.0  # wing: finetune
    monkeypatch.chdir("/")  # the saved configuration means the same everywhere
    again = main(["train", f"--config={tmp_path / run / 'config.yaml'}", "--name=again"])
    assert again["val/loss"] == result["val/loss"]


def test_an_image_that_joins_a_group_goes_where_the_group_is(bursts, tmp_path):
    before = setup(ImageFolderData(csv=str(listed(tmp_path, bursts[::2], "path,label,group"))))
    after = setup(ImageFolderData(csv=str(listed(tmp_path, bursts, "path,label,group"))))
    places = {item.path: item.split for item in after.items}
    moved = [item for item in before.items if places[item.path] != item.split]
    assert not moved


def test_groups_that_share_an_image_are_one(bursts, tmp_path):
    shutil.copy(tmp_path / bursts[0][0], tmp_path / bursts[6][0])
    data = setup(ImageFolderData(csv=str(listed(tmp_path, bursts, "path,label,group"))))
    joined = {path for path, _, group in bursts if group in (bursts[0][2], bursts[6][2])}
    assert len(joined) == 6
    assert len({item.split for item in data.items if item.path in joined}) == 1


def test_a_list_without_groups_splits_as_a_folder_does(colours, tmp_path):
    paths = sorted(colours.rglob("*.png"))
    rows = [(path.relative_to(tmp_path).as_posix(), path.parent.name) for path in paths]
    of_list = setup(ImageFolderData(csv=str(listed(tmp_path, rows))))
    of_folder = setup(ImageFolderData(str(colours)))
    assert {i.digest: (i.label, i.split) for i in of_list.items} == {
        i.digest: (i.label, i.split) for i in of_folder.items
    }


@pytest.mark.parametrize(
    ("splits", "counts"),
    [
        (["train", "val", "test"], {"train": 30, "val": 30, "test": 30}),
        (["train", "valid", "train"], {"train": 60, "val": 30}),
        (["train", "train", "test"], {"train,val": 60, "test": 30}),
        (["train", "val", ""], {"train,val,test": 90}),
    ],
)
def test_a_list_may_give_splits(splits, counts, bursts, tmp_path):
    rows = [(path, label, splits[number % 3]) for number, (path, label, _) in enumerate(bursts)]
    data = setup(ImageFolderData(csv=str(listed(tmp_path, rows, "path,label,split"))))
    found = Counter(item.split for item in data.items)
    assert {names: sum(found[name] for name in names.split(",")) for names in counts} == counts
    assert "test" in found or "test" not in ",".join(counts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\na.png,x\n", "lacks path"),
        ("path,label\na.png,x\nb.png,x\n", "1 class(es)"),
        ("path,label\na.png,x\nb.png,\n", "line 3: no label"),
        ("path,label\na.png,x\na.png,y\n", "line 3: a.png is listed twice"),
        ("path,label,split\na.png,x,holdout\nb.png,y,val\n", "line 2: unknown split 'holdout'"),
        ("path,label,split,group\na.png,x,train,g\nb.png,y,val,g\n", "group 'g' is in several splits"),
        ("path,label,label\na.png,x,y,z\n", "a column name appears twice in its first line"),
        ("path,label\na.png,x\nb.png,y\n", "2 of 2 images"),
        ("\xff\xfe", "not UTF-8"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(text, said, tmp_path, refused):
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    line = refused("train", f"--data.csv={tmp_path / 'list.csv'}", "--model.image_size=32")
    if said == "2 of 2 images":  # too few to be too many; what is left is nothing
        said = "class 'x': no readable image"
    assert said in line


def test_a_root_and_a_list_are_too_much(colours, refused):
    assert "either --data.root" in refused("train", f"--data.root={colours}", "--data.csv=list.csv")


def test_an_unknown_kind_of_data_is_refused_by_name(colours, refused):
    line = refused("train", f"--data.root={colours}", "--data.source=cloud")
    assert "--data.source=cloud: no such kind of data; choose from folder, csv" in line
    assert "conflicts with --data.source=folder" in refused("train", "--data.csv=list.csv", "--data.source=folder")


def test_the_order_of_training_images_has_a_seed(colours, monkeypatch):
    def first_batch(seed: str, **options) -> list[int]:
        data = ImageFolderData(str(colours), **options)
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)  # as seed_everything leaves it, also after the data was made
        model = TransferClassifier(data.class_names, image_size=32)
        quiet_trainer("cpu", max_epochs=1).fit(model, datamodule=data)
        return data.train_dataloader().batch_sampler.batches()[0].tolist()

    assert first_batch("7") == first_batch("3", order_seed=7)
    assert first_batch("7") != first_batch("3")


def test_long_pictures_that_a_crop_would_cut_are_counted(colours, train, capsys):
    for number in range(7):
        Image.new("RGB", (40, 120), "red").save(colours / f"red/long{number}.png")
    train(colours, "--trainer.max_epochs=1")
    assert "7 of 67 images are at least twice as long as wide" in capsys.readouterr().out
    train(colours, "--trainer.max_epochs=1", "--model.fit=pad")
    assert "twice as long" not in capsys.readouterr().out
