"""Fine-tuning: what learns and what does not, what the checkpoint holds, and where it goes on."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer

from headstart import ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.errors import UserError
from headstart.features.cache import FeatureCache
from headstart.finetune.cut import cut, learning_names
from headstart.finetune.module import FineTunedClassifier, layer_of
from headstart.model.backbone import FrozenBackbone, tensor_digests
from headstart.model.checkpoints import finetuned_in
from support import draw, killed_at, newest_run, working_in

SMALL = ["--report=false", "--trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def striped(tmp_path_factory) -> Path:
    """A folder with two classes that differ in the direction of fine stripes, which a backbone for 32 pixels half sees;
    and in `logs` a run on them, with its cache."""
    random = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("striped")
    for name, axis in (("across", 0), ("down", 1)):
        folder = root / "stripes" / name
        folder.mkdir(parents=True)
        for number in range(30):
            wave = 60 * np.sin(np.arange(40) * random.uniform(1.2, 2.2) + random.uniform(0, 6))
            pixels = 128 + np.expand_dims(wave, axis).repeat(40, axis)[..., None] + random.normal(0, 40, (40, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")
    with working_in(root):
        # A tiny backbone: a checkpoint of resnet18's last layers and their moments is 100 MB.
        options = ["--model.backbone=timm/test_resnet", "--model.weights=random", "--model.image_size=32"]
        # One epoch, after which the head has not learnt all that it could.
        options += ["--report=false", "--trainer.max_epochs=1", "--name=head"]
        main(["train", "--data.root=stripes", *options])
    return root


@pytest.fixture
def stripes(striped) -> Path:
    """The images, which tests only read."""
    return striped / "stripes"


@pytest.fixture
def head(striped, tmp_path, own_cache) -> Path:
    shutil.copytree(striped / "logs", tmp_path / "logs")
    shutil.copytree(striped / "cache", own_cache)
    return next(tmp_path.glob("logs/head/*/checkpoints/best.ckpt"))


def finetune(head: Path | str, *options: str) -> dict:
    return main(["finetune", f"--ckpt_path={head}", *SMALL, *options])


def test_layers_are_named_by_their_path():
    names = ["conv1.weight", "layer4.1.bn2.bias", "features.7.0.block.0.weight", "encoder.ln.weight"]
    names += ["encoder.layers.encoder_layer_11.mlp.0.weight", "features.denseblock4.denselayer1.conv1.weight"]
    layers = ["conv1", "layer4.1", "features.7.0", "encoder.ln"]
    layers += ["encoder.layers.encoder_layer_11", "features.denseblock4"]
    assert [layer_of(name) for name in names] == layers


@pytest.mark.parametrize(
    ("unfreeze", "front"), [("layer4", (256, 2, 2)), ("layer3", (128, 4, 4)), ("layer4.1", (512, 1, 1))]
)
def test_the_front_and_the_rest_give_what_the_whole_gives(unfreeze, front):
    module = FineTunedClassifier(["a", "b"], image_size=32, unfreeze=unfreeze).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert module.front.shape == front
    assert torch.allclose(module(images), module(module.front(images)), atol=1e-5)
    learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    parts = [f"layer{number}" for number in range(int(unfreeze[5]), 5)]
    assert all(name.startswith("head.") or any(f".{part}" in name for part in parts) for name in learning)
    assert not any(parameter.requires_grad for parameter in module.front.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_b0",
        "mobilenet_v3_large",
        "convnext_tiny",
        "densenet121",
        pytest.param("vit_b_16", marks=pytest.mark.slow),
    ],
)
def test_other_backbones_are_divided_or_do_without(name):
    net = FrozenBackbone(name, "random").net
    layer = [child for child, module in net.named_modules() if child and len(list(module.parameters())) > 4][-1]
    module = FineTunedClassifier(["a", "b"], layer, backbone=name, weights="random").eval()
    side = module.backbone.preprocessing.crop_size
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    logits = module(images)
    if module.front:
        assert torch.allclose(logits, module(module.front(images)), atol=1e-4)
    else:
        with pytest.raises(UserError, match=r"--data\.cache=false"):
            module.frozen  # noqa: B018  # asked for, as the data does
    logits.sum().backward()
    changed = {name for name, parameter in module.backbone.named_parameters() if parameter.grad is not None}
    assert changed <= set(module.learning)
    assert any(name.startswith(f"net.{layer}.") for name in changed)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("timm/test_vit", "blocks.5", (17, 64)),
        ("timm/test_vit", "norm", (17, 64)),
        ("swin_t", "features.7", (2, 2, 768)),
        ("convnext_tiny", "features.7", (768, 2, 2)),
        ("densenet121", "features.denseblock4", (512, 2, 2)),
    ],
)
def test_what_fx_cannot_split_is_cut_by_running_it(name, layer, shape):
    module = FineTunedClassifier(["a", "b"], layer, backbone=name, weights="random", image_size=64).eval()
    net, images = module.backbone.net, torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    cached = module.front(images)
    assert module.front.shape == shape
    assert torch.allclose(module.features(cached), module.features(images), atol=1e-5)
    frozen = {id(tensor) for key, tensor in net.named_parameters() if f"net.{key}" not in module.learning}
    assert {id(tensor) for tensor in module.front.parameters()} == frozen
    module.features(cached).sum().backward()
    assert {f"net.{key}" for key, tensor in net.named_parameters() if tensor.grad is not None} <= set(module.learning)
    assert not any(each._forward_pre_hooks for each in net.modules())


@pytest.mark.parametrize("layer", ["blocks.5.attn", "blocks.5.mlp", "patch_embed"])
def test_a_cut_that_more_than_one_tensor_crosses_is_not_made(layer):
    """Past the layers of a block leads its residual connection; before the first layer there is nothing to cache."""
    assert cut(FrozenBackbone("timm/test_vit", "random", 32), layer) is None


def test_a_vision_transformer_learns_on_its_cached_front(colours, train, monkeypatch):
    train(colours, "--model.backbone=timm/test_vit", "--model.weights=random", "--trainer.max_epochs=2")
    head, filled, compute = newest_run() / "checkpoints/best.ckpt", list[str](), FeatureCache._compute

    def counting(self, missing, size, extractor):
        filled.append(f"{len(missing)} {extractor.network.name}")
        compute(self, missing, size, extractor)

    monkeypatch.setattr(FeatureCache, "_compute", counting)
    before = tensor_digests(TransferClassifier.load_from_checkpoint(head).backbone)
    for precision in ("32-true", "bf16-mixed"):
        finetune(head, "--unfreeze=blocks.5", "--model.lr=0.01", f"--trainer.precision={precision}")
        tuned = TransferClassifier.load_from_checkpoint(newest_run() / "checkpoints/last.ckpt").backbone
        after = tensor_digests(tuned)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if name.startswith(("net.blocks.5.", "net.norm."))}
    assert filled == ["60 timm/test_vit before blocks.5"]


def test_features_of_all_stages_are_refused(colours, train, refused):
    train(colours, "--model.layers=all", "--trainer.max_epochs=1")
    line = refused("finetune", f"--ckpt_path={newest_run() / 'checkpoints/best.ckpt'}")
    assert "--model.layers=all: fine-tuning is for the last layer's features; train with --model.layers=last" in line


def test_an_unknown_layer_is_refused():
    with pytest.raises(UserError, match="conv1, bn1, layer1, layer2, layer3, layer4"):
        learning_names(FrozenBackbone(image_size=32).net, "layer5")


def test_layers_learn_at_falling_rates():
    module = FineTunedClassifier(["a", "b"], unfreeze="layer3", lr=0.01, head_lr=0.1, layer_decay=0.5)
    groups = module.parameter_groups()
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.01, 0.005, 0.0025, 0.00125])
    held = {id(parameter) for group in groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("cache", "batch_norm"), [("true", "eval"), ("false", "train")])
def test_what_is_before_the_layer_keeps_its_digest(head, cache, batch_norm):
    before = tensor_digests(TransferClassifier.load_from_checkpoint(head).backbone)
    finetune(head, f"--data.cache={cache}", f"--batch_norm={batch_norm}", "--model.lr=0.01")
    after = tensor_digests(TransferClassifier.load_from_checkpoint(newest_run() / "checkpoints/last.ckpt").backbone)
    changed = {name for name in before if before[name] != after[name]}
    layer = {name for name in before if name.startswith("net.layer4.")}
    buffers = {name for name in layer if "running_" in name or "num_batches" in name}
    assert changed == (layer if batch_norm == "train" else layer - buffers)
    assert any(name.endswith("running_var") for name in before if name not in layer)


def test_a_frozen_layer_that_changes_makes_the_run_fail(stripes):
    class Leaky(FineTunedClassifier):
        def on_train_epoch_end(self):
            self.backbone.net.bn1.running_mean += 0.1

    data = ImageFolderData(str(stripes))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", **quiet)
    with pytest.raises(RuntimeError, match=r"net\.bn1\.running_mean"):
        trainer.fit(Leaky(data.class_names, image_size=32), data)


def test_it_learns_what_the_head_alone_could_not(head):
    """From random weights, which see no stripes, the whole network learns them."""
    whole = ["--unfreeze=all", "--batch_norm=train", "--data.batch_size=8", "--model.lr=0.002"]
    result = finetune(head, *whole, "--trainer.max_epochs=8")
    assert result["val/loss"] < result["before/val/loss"]
    assert result["test/acc"] >= 0.9 > result["before/test/acc"]
    assert result["recommended"] == "checkpoints/best.ckpt"


def test_the_checkpoint_holds_what_learnt_and_all_verbs_take_it(head, stripes, tmp_path):
    result = finetune(head, "--model.lr=0.003", "--trainer.precision=32-true", "--data.feature_precision=fp32")
    run = newest_run()
    best = run / "checkpoints/best.ckpt"
    tuned = finetuned_in(torch.load(best, weights_only=True))
    assert tuned
    assert all(name.startswith("net.layer4.") for name in tuned)
    assert (run / "checkpoints/head.ckpt").read_bytes() == head.read_bytes()
    evaluated = main(["evaluate", f"--ckpt_path={best}", "--data.feature_precision=fp32", "--report=false"])
    assert evaluated["test/acc"] == pytest.approx(result["test/acc"])
    assert evaluated["test/loss"] == pytest.approx(result["test/loss"], rel=1e-4)
    assert evaluated["digest"] != json.loads((head.parent.parent / "result.json").read_text())["digest"]
    # wing: deploy
    with (run / "splits.csv").open(newline="") as file:
        all_rows = list(csv.DictReader(file))
    rows = [row for row in all_rows if row["split"] == "test"]
    paths = [str(stripes / row["path"]) for row in rows]
    main(["predict", f"--ckpt_path={best}", *paths, "--output=rows.csv", "--feature_precision=fp32"])
    with Path("rows.csv").open(newline="") as file:
        said = [row["label"] for row in csv.DictReader(file)]
    right = sum(label == row["class"] for label, row in zip(said, rows, strict=True))
    assert right / len(rows) == pytest.approx(result["test/acc"])
    val = [str(stripes / row["path"]) for row in all_rows if row["split"] == "val"]
    main(["predict", f"--ckpt_path={best}", *val, "--output=val.csv", "--feature_precision=fp32"])
    with Path("val.csv").open(newline="") as file:  # of the tuned features, each validation image has its own rank
        known = sorted(float(row["known"]) for row in csv.DictReader(file))
    assert known == pytest.approx([(rank + 2) / (len(val) + 1) for rank in range(len(val))], abs=1.1 / len(val))
    for output in ("model.pth", "model.onnx"):
        assert main(["export", f"--ckpt_path={best}", f"--output={output}"])["difference"] < 1e-4
    name = "layer4.0.conv1.weight"
    learnt = torch.load(best, weights_only=True)["state_dict"][f"backbone.net.{name}"]
    assert torch.equal(torch.load("model.pth", weights_only=True)[name], learnt)
    # /wing


def test_the_fit_of_a_head_refuses_a_backbone_that_was_fine_tuned(head, refused):
    finetune(head, "--trainer.max_epochs=1")
    best = newest_run() / "checkpoints/best.ckpt"
    options = (
        f"--config={next(Path('logs/head').iterdir()) / 'config.yaml'}",
        f"--ckpt_path={best}",
        "--trainer.max_epochs=3",
    )
    assert "its backbone was fine-tuned; use finetune to resume" in refused("train", *options)


def test_fine_tuning_goes_on_from_fine_tuned_layers(head):
    finetune(head, "--model.lr=0.003")
    first = newest_run() / "checkpoints/best.ckpt"
    trained = torch.load(first, weights_only=True)
    result = finetune(first, "--unfreeze=layer4.0.conv2", "--name=second")
    second = torch.load(newest_run() / "checkpoints/best.ckpt", weights_only=True)
    assert set(finetuned_in(second)) == set(finetuned_in(trained))
    name = "backbone.net.layer4.0.conv1.weight"  # frozen now, at what it had learnt
    assert torch.equal(second["state_dict"][name], trained["state_dict"][name])
    scores = json.loads((first.parent.parent / "result.json").read_text())
    assert result["before/val/acc"] == pytest.approx(scores["val/acc"])


@pytest.mark.parametrize("kind", ["cached", "images"])
def test_interrupted_fine_tuning_ends_with_the_same_bits(kind, head):
    norms = ["--unfreeze=all", "--batch_norm=train"]
    ways = {
        "cached": ["--data.views=2", "--data.augment=light"],
        "images": ["--data.cache=false", "--data.augment=strong", "--data.num_workers=0", *norms],
    }
    options = [*ways[kind], "--trainer.max_epochs=3", "--model.layer_decay=0.7"]
    finetune(head, "--name=whole", *options)
    whole = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)

    with killed_at(2, FineTunedClassifier, "on_train_epoch_end"):
        finetune(head, "--name=parts-finetune", *options)
    shutil.move(head.parent.parent, "elsewhere")  # the run has its own copy of the head
    result = finetune("last", "--trainer.max_epochs=3")
    (run,) = Path("logs/parts-finetune").iterdir()
    parts = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(whole["state_dict"][name], parts["state_dict"][name]) for name in whole["state_dict"])
    moments = [
        [value for state in found["optimizer_states"][0]["state"].values() for value in state.values()]
        for found in (whole, parts)
    ]
    assert all(torch.equal(*pair) for pair in zip(*moments, strict=True))
    assert "before/val/acc" in result


def test_the_front_is_computed_once(head, monkeypatch):
    compute, filled = FeatureCache._compute, []

    def counting(self, missing, *rest):
        filled.append(len(missing))
        compute(self, missing, *rest)

    monkeypatch.setattr(FeatureCache, "_compute", counting)
    finetune(head, "--trainer.max_epochs=1")
    finetune(head, "--trainer.max_epochs=1", "--model.lr=0.01")
    assert filled == [60]


def test_what_does_not_help_leaves_the_head_as_the_recommendation(head, capsys):
    result = finetune(head, "--model.lr=10", "--model.head_lr=10", "--trainer.max_epochs=1")
    assert result["val/loss"] > result["before/val/loss"]
    assert result["recommended"] == "checkpoints/head.ckpt"
    out = capsys.readouterr().out
    assert "the head alone is the better choice" in out
    assert f"--ckpt_path={newest_run().resolve() / 'checkpoints/head.ckpt'}" in out  # wing: deploy
    saved = json.loads((newest_run() / "result.json").read_text())
    assert saved["recommended"] == "checkpoints/head.ckpt"


def test_the_saved_configuration_repeats_the_run(head):
    first = finetune(head, "--model.lr=0.002")
    again = main(["finetune", f"--config={newest_run() / 'config.yaml'}", "--name=again"])
    assert again["val/loss"] == first["val/loss"]


def test_the_report_is_that_of_the_fine_tuned_head(head):
    main(["finetune", f"--ckpt_path={head}", "--trainer.max_epochs=1"])
    report = (newest_run() / "report.html").read_text()
    assert "trainer.max_epochs: 1" in report
    assert "Would more photos help" not in report


def test_a_mistake_is_one_line(head, refused, tmp_path):
    assert "--ckpt_path is missing" in refused("finetune")
    assert "is not a file" in refused("finetune", "--ckpt_path=nowhere.ckpt")
    assert "no unfinished run" in refused("finetune", "--ckpt_path=last")
    assert "--unfreeze=layer9" in refused("finetune", f"--ckpt_path={head}", "--unfreeze=layer9")
    assert "--model.layer_decay" in refused("finetune", f"--ckpt_path={head}", "--model.layer_decay=2")
    draw(tmp_path / "others", images=5)
    assert "has 2 classes" in refused("finetune", f"--ckpt_path={head}", f"--data.root={tmp_path / 'others'}")
    shutil.copy(head, "lone.ckpt")
    assert "--data.root" in refused("finetune", "--ckpt_path=lone.ckpt")


def test_a_fine_tuned_module_keeps_the_settings_that_are_its_bases(head):
    finetune(head, "--model.weight_decay=0.5", "--trainer.max_epochs=1")
    module = FineTunedClassifier.load_from_checkpoint(newest_run() / "checkpoints/best.ckpt")
    assert module.hparams["weight_decay"] == 0.5
    assert module.backbone.preprocessing.crop_size == 32
    assert module.hparams["unfreeze"] == "layer4"


def test_a_seed_of_true_is_drawn_and_kept(head, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.setattr("secrets.randbelow", lambda limit: 1234)
    finetune(head, "--trainer.max_epochs=1", "--seed_everything=true")
    assert "seed_everything: 1234\n" in (newest_run() / "config.yaml").read_text()
