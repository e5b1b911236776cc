"""The freeze, and where weights come from."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from headstart import FrozenBackbone, TransferClassifier
from headstart.cli import main
from headstart.errors import UserError
from headstart.model import weights
from headstart.model.backbone import check_frozen, combined, tensor_digests
from headstart.model.checkpoints import FIRST_EDITION
from headstart.model.families import Torchvision
from headstart.model.weights import DEMO, SHA256, for_data
from support import RESNET18, newest_run

AUTO = ("--model.backbone=resnet18", "--model.weights=auto")


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_stays_frozen_whatever_is_asked(pixels):
    backbone = FrozenBackbone()
    before = backbone.digest()
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone(pixels)
    assert backbone.digest() == before


def test_a_torchvision_model_without_gradients_alone_fails_the_check(pixels):
    plain = models.resnet18(weights=None).requires_grad_(False)
    before = tensor_digests(plain)
    plain.train()
    plain(pixels.float())
    with pytest.raises(RuntimeError, match=r"bn1\.running_mean"):
        check_frozen(tensor_digests(plain), before)


def test_a_changed_parameter_or_buffer_changes_the_digest():
    backbone = FrozenBackbone(weights="random")
    digests = {backbone.digest()}
    backbone.net.layer4[1].bn2.running_var[7] += 1e-6
    digests.add(backbone.digest())
    with torch.no_grad():
        backbone.net.conv1.weight[0, 0, 0, 0] += 1e-6
    digests.add(backbone.digest())
    torch.manual_seed(7)  # not by chance where the backbone's own weights began
    backbone.net.load_state_dict(models.resnet18().state_dict(), strict=False)
    digests.add(backbone.digest())
    assert len(digests) == 4


def test_tensors_that_did_not_change_are_hashed_once(monkeypatch):
    backbone = FrozenBackbone(weights="random")
    digest, hashed = backbone.digest(), []
    monkeypatch.setattr("headstart.model.backbone.tensor_bytes", lambda tensor: hashed.append(tensor) or b"")
    assert backbone.digest() == digest
    assert not hashed
    backbone.net.bn1.running_mean += 1
    backbone.digest()
    assert len(hashed) == 1


def test_a_change_without_a_trace_is_found_by_hashing_all():
    backbone = FrozenBackbone(weights="random")
    before = backbone.digests()
    backbone.net.conv1.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(RuntimeError, match=r"net\.conv1\.weight"):
        check_frozen(tensor_digests(backbone), before)


def test_bundled_weights_are_the_default_and_not_random(pixels):
    bundled, random = FrozenBackbone(), FrozenBackbone(weights="random")
    assert (bundled.preprocessing.resize_size, bundled.preprocessing.crop_size) == (146, 128)
    assert (random.preprocessing.resize_size, random.preprocessing.crop_size) == (256, 224)
    assert bundled(pixels).shape == (4, 512)
    assert bundled.digest() != random.digest()
    assert random.digest() == FrozenBackbone(weights="random").digest()


def test_the_image_size_keeps_the_proportions():
    preprocessing = FrozenBackbone(weights="random", image_size=112).preprocessing
    assert (preprocessing.resize_size, preprocessing.crop_size) == (128, 112)


def test_the_copy_for_extraction_computes_the_same(pixels):
    backbone = FrozenBackbone()
    folded = backbone.for_extraction(torch.float32, torch.device("cpu"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.net.modules())
    torch.testing.assert_close(folded(pixels), backbone(pixels), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in backbone.net.modules()) == 20


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "vit_b_16", "mobilenet_v3_small", "densenet121"])
def test_any_classification_model_of_torchvision(name):
    backbone = FrozenBackbone(name, weights="random")
    classifier = models.get_model(name)
    width = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1].in_features
    size = backbone.preprocessing.crop_size
    assert backbone.num_features == width
    assert backbone(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape == (1, width)


@pytest.mark.parametrize("name", ["resnet19", "squeezenet1_1", "fasterrcnn_resnet50_fpn"])
def test_what_has_no_linear_classifier_is_refused(name):
    with pytest.raises(UserError, match=name):
        FrozenBackbone(name, weights="random")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_fc", [True, False])
def test_a_state_dict_of_torchvision_names(suffix, with_fc, tmp_path, pixels):
    torch.manual_seed(3)
    model = models.resnet18().eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if with_fc or not name.startswith("fc.")}
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    backbone = FrozenBackbone(weights=str(path))
    model.fc = nn.Identity()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = model((pixels / 255 - mean) / std)
    torch.testing.assert_close(backbone(pixels), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_another_architecture_are_one_line(tmp_path):
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="another architecture") as caught:
        FrozenBackbone(weights=str(tmp_path / "other.pth"))
    assert "\n" not in str(caught.value)


@pytest.mark.fault("code in an input file")
@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None])
def test_no_pickle_is_executed(variable, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "1")
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "raw.pth"):
        with pytest.raises(UserError):
            FrozenBackbone(weights=str(tmp_path / name))
        with pytest.raises(UserError):
            TransferClassifier.load_from_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_imagenet_weights_are_downloaded_once_and_checked_at_every_load(stand_in_for_imagenet, tmp_path):
    digest = FrozenBackbone(weights="imagenet").digest()
    kept = tmp_path / "torch/hub/checkpoints" / stand_in_for_imagenet.name
    assert kept.exists()
    stand_in_for_imagenet.unlink()
    assert FrozenBackbone(weights="imagenet").digest() == digest
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    with pytest.raises(UserError, match="sha256 differs"):
        FrozenBackbone(weights="imagenet")


@pytest.mark.fault("no network for ImageNet weights")
def test_no_network_names_the_file_and_the_ways_out(stand_in_for_imagenet, refused, colours, tmp_path):
    stand_in_for_imagenet.unlink()
    line = refused("train", f"--data.root={colours}", "--model.weights=imagenet")
    for said in (
        stand_in_for_imagenet.name,
        str(tmp_path / "torch/hub/checkpoints"),
        "sha256",
        "--model.weights=bundled",
    ):
        assert said in line


def test_torchvisions_own_address_and_digest():
    """The real file's name and hash, which cannot be downloaded in a test."""
    name = Torchvision().official("resnet18")[0].rsplit("/", 1)[-1]
    assert name == "resnet18-f37072fd.pth"
    assert SHA256[name].startswith("f37072fd")


def test_the_digest_is_of_names_types_shapes_and_values():
    a = nn.Linear(2, 3)
    b = nn.Linear(3, 2)
    b.weight.data, b.bias.data = a.weight.data.view(2, 3), a.bias.data
    assert combined(tensor_digests(a)) != combined(tensor_digests(b))


@pytest.fixture
def asked(monkeypatch):
    """The addresses that a download was tried from; each fails."""
    found = []

    def fails(url, *_, **__):
        found.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", fails)
    return found


@pytest.mark.fault("no network, and weights=auto")
def test_auto_takes_the_bundled_weights_where_imagenets_cannot_be_had(
    stand_in_for_imagenet, asked, colours, train, capsys, monkeypatch
):
    """It asks once an hour, and never where the environment forbids it; a run keeps what was decided."""
    assert train(colours, *AUTO, "--trainer.max_epochs=1")["weights"] == "bundled"
    assert "the bundled ones, since ImageNet's are not available" in capsys.readouterr().out
    config = newest_run() / "config.yaml"
    assert "weights: bundled" in config.read_text()
    assert FrozenBackbone().weights == "bundled"
    assert len(asked) == 1
    monkeypatch.setattr(weights, "SECONDS_OF_FAILURE", 0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    FrozenBackbone()
    assert len(asked) == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    FrozenBackbone()
    assert len(asked) == 2
    assert main(["train", f"--config={config}", "--name=again"])["weights"] == "bundled"
    assert len(asked) == 2


def test_auto_takes_imagenets_weights_where_they_can_be_had(stand_in_for_imagenet, colours, train, capsys):
    result = train(colours, *AUTO, "--trainer.max_epochs=1")
    assert result["weights"] == "imagenet"
    assert "weights:  ImageNet's, from" in capsys.readouterr().out
    best = next(newest_run().glob("checkpoints/best.ckpt"))
    assert TransferClassifier.load_from_checkpoint(best).backbone.weights == "imagenet"
    assert FrozenBackbone(weights="pretrained").digest() == FrozenBackbone().digest() == result["digest"]


def test_auto_is_bundled_for_the_demo_and_official_for_other_backbones(stand_in_for_imagenet, asked):
    assert for_data("resnet18", "auto", str(DEMO)) == for_data("resnet18", "auto", None) == "bundled"
    assert for_data("resnet18", "auto", "photos") == for_data("resnet50", "auto", str(DEMO)) == "auto"
    assert for_data("resnet18", "random", str(DEMO)) == "random"
    with pytest.raises(UserError, match="could not be downloaded"):
        FrozenBackbone("resnet50")
    assert len(asked) == 1


def test_a_head_of_the_first_bundled_weights_says_so():
    module = TransferClassifier(["a", "b"], weights="bundled")
    made = {"class_names": ["a", "b"], "digest": FIRST_EDITION, "backbone": "resnet18", "weights": "bundled"}
    with pytest.raises(UserError, match="first edition of the bundled weights"):
        module.take({"headstart": made, "state_dict": {f"head.{k}": v for k, v in module.head.state_dict().items()}})


@pytest.mark.parametrize("mirror", [True, False])
def test_features_of_all_stages(mirror, pixels):
    """The signed root of each stage's mean, in the order of the network, also in the copy for extraction."""
    backbone = FrozenBackbone(weights="random", image_size=64, layers="all", mirror=mirror)
    torch.manual_seed(0)
    plain = models.resnet18().eval()
    means: list[torch.Tensor] = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        plain.get_submodule(name).register_forward_hook(lambda *given: means.append(given[2].mean(dim=(2, 3))))

    def of_plain(images):
        means.clear()
        plain((images - backbone.mean) / backbone.std)
        return torch.cat(means, dim=1).sqrt()

    with torch.no_grad():
        wanted = of_plain(pixels)
        if mirror:
            wanted = (wanted + of_plain(pixels.flip(-1))) / 2
        torch.testing.assert_close(backbone(pixels), wanted, rtol=1e-4, atol=1e-4)
        fast = backbone.for_extraction(torch.float32, torch.device("cpu"))
        torch.testing.assert_close(fast(pixels), wanted, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert backbone.num_features == 64 + 128 + 256 + 512


def test_a_head_on_all_stages_through_the_commands(colours, train, refused):
    """Where left and right matter, the features are not averaged over the mirrored image."""
    train(colours, *RESNET18, "--model.layers=all", "--data.flip=false", "--trainer.max_epochs=2")
    best = newest_run() / "checkpoints/best.ckpt"
    module = TransferClassifier.load_from_checkpoint(best)
    assert (module.backbone.layers, module.hparams["mirror"]) == ("all", False)
    assert main(["evaluate", f"--ckpt_path={best}"])["test/acc"] == 1.0
    assert "no stages" in refused(
        "train", f"--data.root={colours}", "--model.backbone=swin_t", "--model.weights=random", "--model.layers=all"
    )
