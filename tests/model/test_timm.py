"""timm's networks through every command, and where their weights come from."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

from headstart import FrozenBackbone, TransferClassifier
from headstart.cli import main
from headstart.errors import UserError
from headstart.images import preprocess
from headstart.model.timm import FITS
from support import draw, killed_at, newest_run

TINY = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"]
LAST = {"test_resnet": "layer4", "test_vit": "blocks.5", "test_convnext": "stages.3", "test_efficientnet": "conv_head"}
ONE_OR_ALL = [pytest.param(name, marks=[pytest.mark.slow] * (name != "test_vit")) for name in TINY]
REPOSITORY = "timm/test_vit.r160_in1k"
OPTIONS = ("--model.weights=random", "--model.image_size=32", "--trainer.max_epochs=2", "--report=false")


@pytest.mark.parametrize("name", [*TINY, "mobilenetv4_conv_small"])
def test_features_are_timms_own(name):
    """Also where its crop mode is another; one of these networks has features wider than its ``num_features``."""
    pixels = np.random.default_rng(0).integers(0, 255, (18, 33, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((640, 301))
    backbone = FrozenBackbone(f"timm/{name}", "random")
    net = timm.create_model(name, num_classes=0).eval()
    net.load_state_dict(backbone.net.state_dict())
    config = timm.data.resolve_model_data_config(net)
    assert FITS[config["crop_mode"]] == backbone.preprocessing.fit
    for mode, fit in FITS.items():
        backbone.preprocessing.fit = fit
        transform = timm.data.create_transform(**config | {"crop_mode": mode}, is_training=False)
        with torch.no_grad():
            wanted, found = net(transform(image)[None]), backbone(preprocess(image, backbone.preprocessing)[None])
        assert found.shape == (1, backbone.num_features)
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", ONE_OR_ALL)
def test_every_command(name, colours, capsys, tmp_path):
    options = [f"--data.root={colours}", f"--model.backbone=timm/{name}", *OPTIONS]
    whole = main(["train", *options, "--name=whole"])
    best = newest_run() / "checkpoints/best.ckpt"
    assert whole["licence"] == "apache-2.0"
    with killed_at(1, TransferClassifier):
        main(["train", *options, "--name=killed"])
    assert "HIT" in capsys.readouterr().out
    resumed = main(["train", "--ckpt_path=last", "--name=killed"])
    assert {key: value for key, value in resumed.items() if key.startswith("test/")} == {
        key: value for key, value in whole.items() if key.startswith("test/")
    }
    assert main(["tune", *options, "--tune.draws=2"])["result"]["backbone"] == f"timm/{name}"
    assert main(["evaluate", f"--ckpt_path={best}"])["test/acc"] == pytest.approx(whole["test/acc"])
    shades = {f"shade{number}": (40 * number, 250 - 40 * number, 128) for number in range(6)}
    folder, task = draw(tmp_path / "shades", 8, colours=shades), ["--episodes=5", "--n_way=2", "--n_query=2"]
    assert (
        main(["fewshot", f"--data.root={folder}", *options[1:4], "--data.test_fraction=0.4", *task])["test/acc"] > 0.5
    )


@pytest.mark.wing("finetune")
@pytest.mark.parametrize("name", ONE_OR_ALL)
def test_its_last_layers_learn(name, colours, capsys):
    main(["train", f"--data.root={colours}", f"--model.backbone=timm/{name}", *OPTIONS])
    best = newest_run() / "checkpoints/best.ckpt"
    capsys.readouterr()
    for _ in range(2):
        main(
            ["finetune", f"--ckpt_path={best}", f"--unfreeze={LAST[name]}", "--trainer.max_epochs=1", "--report=false"]
        )
    assert "HIT" in capsys.readouterr().out


@pytest.mark.wing("deploy")
@pytest.mark.parametrize("name", ONE_OR_ALL)
def test_its_exports(name, colours, tmp_path, capsys):
    """ONNX, compared when it is written; and timm's own state dict, with an input of another size."""
    options = [f"--data.root={colours}", f"--model.backbone=timm/{name}", *OPTIONS]
    main(["train", *options])
    best = newest_run() / "checkpoints/best.ckpt"
    main(["predict", f"--ckpt_path={best}", f"{colours}/red", "--output=rows.csv", "--explain=maps"])
    assert "red" in Path("rows.csv").read_text()
    assert len(list(Path("maps").iterdir())) == 20
    main(["export", f"--ckpt_path={best}", "--output=model.onnx"])
    main(["export", f"--ckpt_path={best}", "--output=model.pth"])
    size = {"img_size": 32} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=3, **size).eval()
    net.load_state_dict(torch.load("model.pth", weights_only=True))
    module = TransferClassifier.load_from_checkpoint(best)
    image = Image.open(colours / "red/000.png")
    pixels = preprocess(image, module.backbone.preprocessing)[None]
    with torch.no_grad():
        found = net((pixels - module.backbone.mean) / module.backbone.std).softmax(dim=1)[0]
    torch.testing.assert_close(found, module.predict(image), rtol=0, atol=1e-4)


def on_the_hub(cache: Path, revision: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights that were downloaded, in the form of the hub's cache, as its newest revision."""
    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = timm.create_model("test_vit").state_dict()
    folder = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(revision)
    safetensors.torch.save_file(state, folder / "snapshots" / revision / "model.safetensors")
    return state


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.mark.fault("timm weights of another revision, changed or truncated")
def test_a_revision_is_fetched_again_and_checked(hub, colours, refused):
    state = on_the_hub(hub, FIRST, 1)
    backbone = FrozenBackbone("timm/test_vit")
    assert backbone.weights == f"pretrained@{FIRST}"
    torch.testing.assert_close(backbone.net.state_dict()["norm.weight"], state["norm.weight"], rtol=0, atol=0)
    assert FrozenBackbone("timm/test_vit", image_size=96).net.pos_embed.shape[1] == 1 + 36  # resampled by timm
    main(["train", f"--data.root={colours}", "--model.backbone=timm/test_vit", *OPTIONS[1:]])
    best = newest_run() / "checkpoints/best.ckpt"
    assert json.loads((newest_run() / "result.json").read_text())["weights"] == f"pretrained@{FIRST}"
    on_the_hub(hub, SECOND, 2)
    assert FrozenBackbone("timm/test_vit").weights == f"pretrained@{SECOND}"
    assert TransferClassifier.load_from_checkpoint(best).backbone.weights == f"pretrained@{FIRST}"
    (first,) = hub.glob(f"*/snapshots/{FIRST}")
    (second,) = hub.glob(f"*/snapshots/{SECOND}/model.safetensors")
    shutil.copy(second, first / "model.safetensors")
    assert "not to timm/test_vit" in refused("evaluate", f"--ckpt_path={best}")
    (first / "model.safetensors").write_bytes(second.read_bytes()[:5000])
    assert "damaged" in refused("evaluate", f"--ckpt_path={best}")
    shutil.rmtree(first)
    line = refused("evaluate", f"--ckpt_path={best}")
    for said in (f"{REPOSITORY}@{FIRST}", "model.safetensors", str(hub), "random"):
        assert said in line


@pytest.mark.fault("timm backbone that is not available")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["vit_smal_patch16_224"], "timm/vit_small_patch16_224"),
        (["test_vit.r999"], "the nearest names are timm/test_vit"),
        (["test_vit"], "model.safetensors of timm/test_vit.r160_in1k"),
        (["test_vit", "--model.weights=bundled"], "use pretrained, random or a path"),
        (["test_vit", "--model.weights=random", "--model.image_size=90"], "divisible by patch size"),
        (["test_resnet", "--model.weights=other.pth"], "does not fit timm/test_resnet"),
        (["test_vit", "--model.weights=random", "--model.layers=all"], "has no stages"),
    ],
)
def test_a_mistake_is_one_line(options, said, hub, colours, refused):
    torch.save(nn.Linear(3, 2).state_dict(), "other.pth")
    name, *others = options
    assert said in refused("train", f"--data.root={colours}", f"--model.backbone=timm/{name}", *others)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[timm\]'"):
        FrozenBackbone("timm/test_vit")


@pytest.mark.parametrize("with_head", [True, False])
def test_a_file_in_timms_layout(with_head, tmp_path):
    torch.manual_seed(5)
    net: Any = timm.create_model("test_efficientnet", num_classes=1000 if with_head else 0)
    safetensors.torch.save_file(
        {name: value.half() for name, value in net.state_dict().items()}, tmp_path / "a.safetensors"
    )
    backbone = FrozenBackbone("timm/test_efficientnet", str(tmp_path / "a.safetensors"))
    wanted = net.state_dict()["conv_stem.weight"].half().float()
    torch.testing.assert_close(backbone.net.state_dict()["conv_stem.weight"], wanted, rtol=0, atol=0)
