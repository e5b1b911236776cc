"""The head, its training step, and its checkpoint."""

import json

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch.nn import functional
from torchvision import models

from headstart import ImageFolderData, TransferClassifier
from headstart.errors import UserError
from headstart.model.backbone import FrozenBackbone, combined, tensor_digests
from headstart.model.heads import class_weights
from headstart.model.schedule import warmup_cosine
from headstart.model.sealed import SEAL
from headstart.model.task import SingleLabel
from support import TINY, draw


def trainer(*callbacks: Callback, epochs: int = 2) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


def test_images_and_their_features_give_the_same_logits():
    model = TransferClassifier(["a", "b"], weights="random")
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model(images), model(model.backbone(images)), rtol=0, atol=0)
    assert model(images).shape == (3, 2)


class Drift(Callback):
    """A bug somebody could make: BatchNorm's statistics change in mid-fit."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.backbone.net.bn1.running_mean += 1e-3


def test_a_buffer_that_changes_in_mid_fit_makes_the_run_fail(colours):
    data = ImageFolderData(str(colours))
    model = TransferClassifier(data.class_names, image_size=32)
    with pytest.raises(RuntimeError, match=r"frozen backbone changed: net\.bn1\.running_mean"):
        trainer(Drift()).fit(model, datamodule=data)


def test_a_plain_frozen_model_fails_the_same_check_in_a_fit(colours):
    class Plain(torch.nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.net = models.resnet18(weights=None).requires_grad_(False)
            self.net.fc = torch.nn.Identity()
            self.preprocessing = backbone.preprocessing
            self.digests = lambda: tensor_digests(self)
            self.digest = lambda: combined(self.digests())

        def forward(self, images):
            return self.net(images.float())

    data = ImageFolderData(str(colours), cache=False, num_workers=0)
    model = TransferClassifier(data.class_names, image_size=32)
    model.backbone = Plain(model.backbone)
    model.remember_backbone()
    with pytest.raises(RuntimeError, match="running_mean"):
        trainer(epochs=1).fit(model, datamodule=data)


@pytest.mark.parametrize("cache", [True, False])
def test_the_backbone_is_the_same_after_a_fit_and_only_the_head_learns(cache, colours):
    data = ImageFolderData(str(colours), cache=cache, num_workers=0)
    model = TransferClassifier(data.class_names, image_size=32)
    digest, head = model.backbone.digest(), model.head.weight.clone()
    fit = trainer()
    fit.fit(model, datamodule=data)
    assert model.backbone.digest() == digest
    assert not torch.equal(model.head.weight, head)
    learnt = [parameter for group in fit.optimizers[0].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in learnt} == {id(parameter) for parameter in model.head.parameters()}


def test_balanced_class_weights_weigh_the_training_loss_alone(tmp_path):
    root = draw(tmp_path / "uneven", images=30, colours={"blue": (40, 60, 200)})
    draw(root, images=6, colours={"red": (200, 50, 40)})
    data = ImageFolderData(str(root))
    model = TransferClassifier(data.class_names, image_size=32, class_weights="balanced", label_smoothing=0.0)
    fit = trainer(epochs=1)
    fit.fit(model, datamodule=data)
    counts = data.counts("train")
    torch.testing.assert_close(model.loss_weights, counts.sum() / (2 * counts))
    val = data.labelled("val")
    features, labels = val.views[0].whole(), val.labels
    expected = functional.cross_entropy(model(features), labels)
    torch.testing.assert_close(fit.callback_metrics["val/loss"], expected, rtol=1e-5, atol=1e-6)


def test_class_weights_by_name_are_one_for_all_others():
    counts = torch.tensor([10, 30, 20])
    assert class_weights({"b": 5}, ["a", "b", "c"], counts).tolist() == [1, 5, 1]
    assert SingleLabel.balanced(counts, 60).tolist() == pytest.approx([2, 2 / 3, 1])
    assert class_weights("balanced", ["a", "b", "c"], counts) is counts
    assert class_weights("none", ["a", "b", "c"], counts) is None


@pytest.mark.fault("a weight for a class that does not exist")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{gren: 5}", "gren: no such class; the nearest names are green"),
        ("{green: 0}", "0: must be a number >0 and <=1000"),
        ("{green: much}", "'much': is not a number"),
        ("balenced", "balenced: is not one of"),
    ],
)
def test_a_mistake_in_the_class_weights_is_one_line(given, said, colours, refused):
    line = refused("train", f"--data.root={colours}", *TINY, f"--model.class_weights={given}")
    assert line.startswith("error: --model.class_weights: ")
    assert line.endswith(said) or "one of" in said


def test_the_metrics_are_what_their_names_say():
    scores = TransferClassifier(["a", "b", "c"]).configure_metrics("test/")
    logits = torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 4, 0], [4, 0, 0], [0, 0, 4], [0, 0, 4]])
    scores.update(logits.softmax(1), torch.tensor([0, 0, 1, 1, 2, 2]))
    found = {name: float(value) for name, value in scores.compute().items()}
    assert found["test/acc"] == pytest.approx(5 / 6)
    assert found["test/balanced_acc"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["test/f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert found["test/calibration_error"] == pytest.approx(abs(logits.softmax(1).max().item() - 5 / 6), abs=1e-5)
    assert set(found) == {"test/acc", "test/balanced_acc", "test/f1", "test/calibration_error"}


def test_the_learning_rate_rises_and_falls():
    rates = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0)
    assert warmup_cosine(10**6, 0, float("inf")) == 1


def test_a_checkpoint_round_trip_is_exact_and_small(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    assert set(content["state_dict"]) == {"head.weight", "head.bias"}
    assert content["headstart"]["class_names"] == ["blue", "green", "red"]
    assert content["headstart"]["preprocessing"]["crop_size"] == 32
    model = TransferClassifier.load_from_checkpoint(checkpoint)
    assert torch.equal(model.head.weight, content["state_dict"]["head.weight"])
    assert model.backbone.digest() == content["headstart"]["digest"]


def altered(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    del content[SEAL]  # as of another maker; with it the change itself would be found
    torch.save(content, path.with_name("altered.ckpt"))
    return path.with_name("altered.ckpt")


def set_names(content):
    content["headstart"]["class_names"] = content["hyper_parameters"]["class_names"] = ["blue", "green", "yellow"]


@pytest.mark.fault("checkpoint of an older layout")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["state_dict"].update(extra=torch.zeros(1)), "its head has parameters"),
        (lambda c: c["state_dict"].pop("head.bias"), "its head has parameters"),
        (lambda c: c.pop("headstart"), "not a headstart checkpoint"),
        (lambda c: c["headstart"].update(layout=0), "layout"),
        (lambda c: c["headstart"].update(digest="0" * 64), "its head belongs to the backbone"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(change, said, checkpoint, colours, refused):
    path = altered(checkpoint.with_name("last.ckpt"), change)
    with pytest.raises(UserError, match=said):
        TransferClassifier.load_from_checkpoint(path)
    options = *TINY, "--trainer.max_epochs=4"
    assert said in refused("train", f"--data.root={colours}", f"--ckpt_path={path}", *options)


@pytest.mark.fault("checkpoint of another backbone", "checkpoint with other classes")
def test_other_classes_and_other_weights_are_refused(checkpoint, colours, refused):
    path = checkpoint.with_name("last.ckpt")
    options = f"--data.root={colours}", *TINY, "--trainer.max_epochs=4"
    other = FrozenBackbone("timm/test_resnet", "random").net.state_dict()
    torch.save({name: 2 * value for name, value in other.items()}, "other.pth")
    line = refused("train", *options, f"--ckpt_path={path}", "--model.weights=other.pth")
    assert "other.pth" in line
    assert "random" in line
    assert "yellow" in refused("train", *options, f"--ckpt_path={altered(path, set_names)}")


@pytest.mark.fault(
    "checkpoint that is truncated, empty or text",
    "missing checkpoint, or a folder in its place",
    "code in an input file",
)
def test_a_damaged_checkpoint_is_one_line(checkpoint, colours, refused):
    path = checkpoint.with_name("last.ckpt")
    content = path.read_bytes()
    for damaged in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(damaged)
        assert "corrupt" in refused("train", f"--data.root={colours}", "--model.image_size=32", f"--ckpt_path={path}")
    assert "is not a file" in refused("train", f"--data.root={colours}", f"--ckpt_path={path.parent}")
    assert "is not a file" in refused("train", f"--data.root={colours}", "--ckpt_path=https://example.org/a.ckpt")


def test_a_checkpoint_from_before_heads_had_names_is_loaded(checkpoint):
    path = altered(checkpoint, lambda content: content["hyper_parameters"].pop("head"))
    assert torch.equal(
        TransferClassifier.load_from_checkpoint(path).head.weight,
        TransferClassifier.load_from_checkpoint(checkpoint).head.weight,
    )


def test_other_weights_from_python_have_features_of_their_own_and_are_refused(colours, own_cache):
    data = ImageFolderData(str(colours))
    model = TransferClassifier(data.class_names, image_size=32)
    model.backbone.net.load_state_dict(models.resnet18().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="frozen backbone changed"):
        trainer(epochs=1).fit(model, datamodule=data)
    (key,) = own_cache.glob("features/*/key.json")
    assert json.loads(key.read_text())["weights"] == combined(tensor_digests(model.backbone))


def test_nothing_is_cached_under_a_digest_that_is_no_longer_the_networks(colours, own_cache):
    data = ImageFolderData(str(colours))
    model = TransferClassifier(data.class_names, image_size=32)
    model.backbone.net.conv1.weight.data[0] += 1  # leaves no trace in the tensor's version
    with pytest.raises(RuntimeError, match="changed after its digest was taken"):
        trainer(epochs=1).fit(model, datamodule=data)
    assert not list(own_cache.glob("features/*/*.safetensors"))
