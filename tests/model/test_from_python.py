"""What the command line refuses is refused from Python too; every way to give an image is the same."""

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer
from torch.utils.data import Dataset

from headstart import DatasetData, ImageFolderData, TransferClassifier
from headstart.decoding import as_rgb
from headstart.device import quiet_trainer
from headstart.errors import UserError
from headstart.images import preprocess
from headstart.model.calibration import fit_temperature
from headstart.model.sealed import SealedCheckpointIO
from support import at_most, draw


class Pairs(Dataset):
    """Four gray images for each of the labels."""

    def __init__(self, labels, classes=None):
        self.labels, self.classes = labels, classes or ["bee", "cat"]

    def __len__(self):
        return 4 * len(self.labels)

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40), (index * 5, 0, 0)), self.labels[index % len(self.labels)]


class Triples(Pairs):
    def __getitem__(self, index):
        return *super().__getitem__(index), "more"


class Rows(Pairs):
    def __getitem__(self, index):
        return {"img": super().__getitem__(index)[0], "label": 0}


def load(data: DatasetData) -> None:
    module = TransferClassifier(data.class_names, image_size=32)
    data.load(module.backbone, torch.device("cpu"))


@pytest.mark.fault("values out of range, from Python")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1}, "lr=-1"),
        ({"class_weights": "balenced"}, "class_weights='balenced' is not one of none, balanced"),
        ({"image_size": 7}, "image_size=7"),
        ({"class_names": ["a", "b", "a"]}, "class_names: 3 names, only 2 distinct"),
        ({"label_smoothing": "much"}, "label_smoothing='much'"),
    ],
)
def test_the_module_refuses(options, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        TransferClassifier(**{"class_names": ["a", "b"]} | options)


@pytest.mark.fault("values out of range, from Python")
@pytest.mark.parametrize(
    ("options", "said"),
    [({"val_fraction": -0.5}, "val_fraction=-0.5"), ({"augment": "some"}, "augment='some'"), ({"views": 0}, "views=0")],
)
def test_the_data_refuse(options, said, colours):
    with pytest.raises(UserError, match=said):
        ImageFolderData(str(colours), **options)


@pytest.mark.fault("dataset of an unexpected form")
@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Pairs([0, 1.7]), r"train\[1\] has the label 1.7"),
        (Pairs([0, 5]), r"has the label 5; labels must be 0 to 1"),
        (Triples([0, 1]), r"train\[0\] is a tuple, not \(image, label\)"),
        (Rows([0, 1]), r"has the columns img, label; name two: columns="),
    ],
)
def test_a_dataset_of_another_form_is_refused(dataset, said):
    with pytest.raises(UserError, match=said):
        load(DatasetData(dataset))


@pytest.mark.fault("datasets that number their classes differently")
@pytest.mark.parametrize("classes", [["cat", "dog"], ["cat", "dog", "emu"], ["cat", "bee", "dog"]])
def test_two_datasets_number_their_classes_alike(classes):
    train, val = Pairs([0, 1, 2], ["bee", "cat", "dog"]), Pairs([0, 1], classes)
    with pytest.raises(UserError, match="val has different classes"):
        DatasetData(train, val)
    assert DatasetData(train, Pairs([0, 1], ["bee", "cat", "dog"])).source.has_val


@pytest.mark.fault("datasets that number their classes differently")
def test_a_module_of_swapped_classes_is_refused(colours):
    module = TransferClassifier(["green", "blue", "red"], image_size=32)
    with pytest.raises(UserError, match="class_names"):
        quiet_trainer("cpu", max_epochs=1).fit(module, ImageFolderData(str(colours)))


@pytest.mark.fault("the same image given as a path, a PIL image or an array")
def test_every_way_to_give_an_image_is_the_same(tmp_path):
    random = np.random.default_rng(0)
    pictures = {}
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = Image.fromarray(random.integers(0, 256, (9, 14, 3), dtype=np.uint8))
    smooth.resize((900, 600), Image.Resampling.BICUBIC).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    smooth.resize((3000, 2000), Image.Resampling.BICUBIC).save(tmp_path / "large.jpg", quality=95)
    deep = random.integers(0, 65536, (9, 14), dtype=np.uint16).repeat(20, axis=0).repeat(20, axis=1)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    smooth.convert("RGBA").save(tmp_path / "alpha.png")
    model = TransferClassifier(["a", "b", "c"], image_size=64)
    model.head.weight.data.mul_(2)
    for path in sorted(tmp_path.glob("*.*g")):
        pictures[path.name] = model.predict(path)
        opened = Image.open(path)
        size = opened.size
        torch.testing.assert_close(model.predict(opened), pictures[path.name], rtol=0, atol=1e-6)
        assert opened.size == size
        assert opened.load() is not None  # it can still be used
        # The command's own rows, from the same decoder through the cache's preprocessing.
        torch.testing.assert_close(model.predict([str(path)])[0], pictures[path.name], rtol=0, atol=1e-6)
    upright = np.asarray(Image.open(tmp_path / "alpha.png").convert("RGB"))
    torch.testing.assert_close(model.predict(upright), pictures["alpha.png"], rtol=0, atol=1e-6)
    turned = Image.open(tmp_path / "turned.jpg").convert("RGB")  # without its orientation: another picture
    assert (model.predict(Image.fromarray(np.asarray(turned))) - pictures["turned.jpg"]).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [np.zeros((8, 8)), np.zeros((3, 8, 8), dtype=np.uint8), 7, "no.png", []])
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(UserError):
        TransferClassifier(["a", "b"], image_size=32).predict(wrong)


@pytest.mark.fault("device without float64, such as Apple's")
def test_float64_is_for_the_processor(monkeypatch):
    class Elsewhere(torch.Tensor):
        """Stands in for a tensor of such a device."""

        def double(self, *_: object) -> torch.Tensor:
            raise TypeError("no float64 here")

        def cpu(self, *_: object) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    logits, labels = torch.randn(20, 3), torch.arange(20) % 3
    assert fit_temperature(logits.as_subclass(Elsewhere), labels) == fit_temperature(logits, labels)


@pytest.mark.fault("checkpoint with missing or non-finite values")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.pop("hyper_parameters"), "lacks hyper_parameters"),
        (lambda made: made.pop("epoch"), "lacks epoch"),
        (lambda made: made["state_dict"].update({"head.weight": torch.zeros(3, 7)}), "its head has parameters"),
        (lambda made: made["state_dict"]["head.bias"].fill_(torch.nan), "not finite"),
        (lambda made: made["headstart"].update(temperature=0.0), "not finite"),
        (lambda made: made["headstart"].update(temperature=torch.inf), "not finite"),
        (lambda made: made.update(headstart=3), "not a headstart checkpoint"),
        (lambda made: made.update(epoch=[1]), "lacks epoch"),
        (lambda made: made["headstart"].pop("preprocessing"), "lacks headstart.preprocessing"),
        (lambda made: made["headstart"].update(digest=None), "lacks headstart.digest"),
        (lambda made: made["headstart"].update(class_names=[1, 2, 3]), "lacks class names"),
        (lambda made: made["hyper_parameters"].update(backbone={}), "lacks hyper_parameters.backbone"),
        (lambda made: made["hyper_parameters"].update(class_names=[]), "lacks class names"),
    ],
)
def test_a_forged_checkpoint_is_refused(change, said, checkpoint, refused):
    io = SealedCheckpointIO()
    content = io.load_checkpoint(checkpoint)
    del content["headstart_sha256"]
    change(content)
    io.save_checkpoint(content, checkpoint)  # with a seal that is right
    assert said in refused("evaluate", f"--ckpt_path={checkpoint}")


@pytest.mark.fault("checkpoint or configuration that repeats a value without end")
def test_a_checkpoint_that_holds_itself_hangs_nothing(checkpoint, refused):
    content = torch.load(checkpoint, weights_only=True)
    many, own = ["x"] * 10, list[object]()
    for _ in range(30):
        many = [many] * 10
    own.append(own)
    for value in (many, own):
        torch.save(content | {"epoch": value}, "bomb.ckpt")
        with at_most(30):
            assert "it holds a value again and again" in refused("evaluate", "--ckpt_path=bomb.ckpt")


@pytest.mark.fault("same image under two labels")
def test_an_image_under_two_labels_is_named(tmp_path, train, capsys, refused):
    root = draw(tmp_path / "own", images=8)
    (root / "red/copy.png").write_bytes((root / "blue/000.png").read_bytes())
    train(root, "--trainer.max_epochs=1")
    assert "1 image(s) have two labels, byte for byte (blue/000.png and red/copy.png)" in capsys.readouterr().out
    options = f"--data.root={root}", "--model.image_size=32", "--data.strict=true"
    assert "--data.strict: 1 image(s) have two labels" in refused("train", *options)


def test_a_plain_trainer_takes_both(colours):
    module = TransferClassifier(["blue", "green", "red"], image_size=32)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, ImageFolderData(str(colours)))
    assert trainer.callback_metrics["val/acc"] >= 0


def test_features_labels_and_paths_need_no_trainer(checkpoint, trained):
    model = TransferClassifier.load_from_checkpoint(checkpoint)
    data = ImageFolderData(str(trained / "colours"))
    features, labels, paths = data.numpy("val", model)
    images = [as_rgb(trained / "colours" / path, model.backbone.preprocessing) for path in paths]
    pixels = torch.stack([preprocess(image, model.backbone.preprocessing) for image in images])
    assert np.allclose(features, model.backbone(pixels), atol=0.02 * np.abs(features).max())
    assert [data.class_names[label] for label in labels] == [path.split("/")[0] for path in paths]
    assert np.array_equal(data.numpy("val", model.backbone)[0], features)
    with pytest.raises(UserError, match="needs the cached features"):
        ImageFolderData(str(trained / "colours"), cache=False).numpy("val", model)
