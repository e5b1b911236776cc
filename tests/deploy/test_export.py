import copy
import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from headstart import DatasetData, ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.decoding import decode
from headstart.deploy.check import _drawing, check_files
from headstart.deploy.onnx import Exported, to_onnx
from headstart.images import preprocess
from headstart.verbs import export as exporting
from support import REPOSITORY, RESNET18, newest_run


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)


def probabilities(checkpoint: Path) -> torch.Tensor:
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        return (module(images()) / module.task.temperature).softmax(dim=1)


def test_the_onnx_file_needs_nothing_else(checkpoint, trained):
    result = main(["export", f"--ckpt_path={checkpoint}", "--output=model.onnx"])
    assert result["images"] == 32
    assert result["difference"] < 1e-4
    onnx.checker.check_model("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["blue", "green", "red"]
    assert json.loads(about["preprocessing"])["crop_size"] == 32
    for count in (1, 5):  # any number of images
        found = torch.from_numpy(session.run(None, {"images": images()[:count].numpy()})[0])
        torch.testing.assert_close(found, probabilities(checkpoint)[:count], rtol=0, atol=1e-5)
    assert [output.name for output in session.get_outputs()] == ["probabilities", "known"]
    assert "validation images" in about["known"]
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    how, paths = module.backbone.preprocessing, sorted((trained / "colours").rglob("*.png"))
    both = torch.cat([images(), torch.stack([preprocess(decode(path.read_bytes(), how), how) for path in paths])])
    known = session.run(["known"], {"images": both.numpy()})[0]
    with torch.no_grad():
        wanted = module.known(module.backbone(both)).numpy()
    assert np.abs(known - wanted).max() < 1.5 / len(module.known.distances)  # an image is one rank off at most
    assert (known[:5] == known.min()).all()  # noise
    assert len(set(known.tolist())) > 3


def test_torchvision_alone_loads_the_weights(colours, train):
    """The article's own code: a resnet18 with a new fc."""
    train(colours, *RESNET18, "--trainer.max_epochs=1")
    checkpoint = newest_run() / "checkpoints/best.ckpt"
    main(["export", f"--ckpt_path={checkpoint}", "--output=resnet18.pth"])
    model = models.resnet18()
    model.fc = nn.Linear(model.fc.in_features, 3)
    model.load_state_dict(torch.load("resnet18.pth", weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = model.eval()(pixels).softmax(dim=1)
    torch.testing.assert_close(found, probabilities(checkpoint), rtol=0, atol=1e-5)


@pytest.mark.fault("export whose outputs differ")
def test_an_export_that_computes_something_else_is_not_written(checkpoint, refused, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    assert "not written" in refused("export", f"--ckpt_path={checkpoint}", "--output=resnet18.pth")
    assert not Path("resnet18.pth").exists()


def test_what_cannot_be_done_is_refused(checkpoint, refused, monkeypatch):
    Path("mine.pth").write_text("mine")
    assert "already exists" in refused("export", f"--ckpt_path={checkpoint}", "--output=mine.pth")
    assert "name it" in refused("export", f"--ckpt_path={checkpoint}", "--output=model.h5")
    assert "--output is missing" in refused("export", f"--ckpt_path={checkpoint}")
    Path("empty").mkdir()
    line = refused("export", f"--ckpt_path={checkpoint}", "--output=a.pth", "--data.root=empty")
    assert "no readable image" in line
    assert "is not a file" in refused("export", "--ckpt_path=nowhere.ckpt", "--output=a.onnx")
    monkeypatch.setattr("headstart.features.arithmetic.INT8_NEEDS", ("not_installed",))
    assert "pip install -e '.[export]'" in refused("export", f"--ckpt_path={checkpoint}", "--output=a.onnx")


def by_the_documented_script(paths: list[Path], monkeypatch, capsys) -> list[tuple[str, float]]:
    """What the program in docs/deploy.md says of files: the label and its probability."""
    text = (REPOSITORY / "docs/deploy.md").read_text()
    (script,) = re.findall(r"^```python export\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(sys, "argv", ["-", *map(str, paths)])
    capsys.readouterr()
    exec(compile(script, "deploy.md", "exec"), {})
    rows = [line.split(" ", 2) for line in capsys.readouterr().out.splitlines()]
    return [(label, float(probability)) for label, probability, _ in rows]


@pytest.mark.fault("exported model in another language")
def test_the_check_pictures_tell_another_decoding(checkpoint, refused, monkeypatch, capsys):
    main(["export", f"--ckpt_path={checkpoint}", "--output=model.onnx"])
    folder = Path("model.onnx.check")
    expected = json.loads((folder / "expected.json").read_text())
    names, wanted = expected["class_names"], expected["probabilities"]
    assert {path.name for path in folder.iterdir()} == {*wanted, "expected.json"}
    assert len(wanted) == 5
    found = by_the_documented_script([folder / name for name in wanted], monkeypatch, capsys)
    for (label, probability), row in zip(found, wanted.values(), strict=True):
        assert names.index(label) == np.argmax(row)
        assert probability == pytest.approx(max(row), abs=expected["tolerance"])
    # Without one of its steps the program fails on the picture that is there for it.
    for step, name in (("ImageOps.exif_transpose", "turned"), ("Image.alpha_composite", "transparent")):
        with monkeypatch.context() as patched:
            patched.setattr(f"PIL.{step}", lambda *given: given[-1])
            (path,) = folder.glob(f"{name}.*")
            ((_, probability),) = by_the_documented_script([path], patched, capsys)
        assert abs(probability - max(wanted[path.name])) > expected["tolerance"]
    Path("second.onnx.check").mkdir()
    line = refused("export", f"--ckpt_path={checkpoint}", "--output=second.onnx")
    assert "second.onnx.check: already exists" in line
    assert not Path("second.onnx").exists()


def test_the_script_pads_and_squashes(monkeypatch, capsys):
    module = TransferClassifier(["a", "b", "c"], "timm/test_efficientnet", "random", image_size=32, fit="pad")
    preprocessing = module.backbone.preprocessing
    preprocessing.bits = 16
    model = onnx.load_from_string(to_onnx(module))
    for fit in ("pad", "squash"):
        preprocessing.fit = fit
        (entry,) = (entry for entry in model.metadata_props if entry.key == "preprocessing")
        entry.value = json.dumps(asdict(preprocessing))
        onnx.save(model, "model.onnx")
        files = check_files(module, Exported(module))
        wanted = json.loads(files.pop("expected.json"))["probabilities"]
        for name, data in files.items():
            Path(name).write_bytes(data)
        found = by_the_documented_script([Path(name) for name in wanted], monkeypatch, capsys)
        probabilities = [max(row) for row in wanted.values()]
        assert [probability for _, probability in found] == pytest.approx(probabilities, abs=1e-3)


def opened(path: Path) -> Image.Image:
    """Not loaded yet, and no file stays open."""
    return Image.open(io.BytesIO(path.read_bytes()))


class Lazy(torch.utils.data.Dataset):
    classes = ("blue", "green", "red")

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return opened(self.paths[index]), index % 3


@pytest.mark.fault("the same image decoded in four ways")
def test_an_image_has_one_answer_by_whichever_way(checkpoint, tmp_path, monkeypatch, capsys):
    """Stored on its side, with 16 bits, transparent, of 6000 x 4000 pixels, with a palette, in CMYK."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "photos"
    for number, name in enumerate(["blue", "green", "red"]):
        (folder / name).mkdir(parents=True)
        _drawing(number).save(folder / name / "turned.jpg", exif=exif)
        deep = np.asarray(_drawing(10 + number).convert("L"), np.uint16) * (257 - number)
        Image.fromarray(deep).save(folder / name / "deep.png")
        clear = _drawing(20 + number)
        clear.putalpha(128)
        clear.save(folder / name / "clear.png")
        _drawing(30 + number).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / name / "palette.png")
        _drawing(40 + number).convert("CMYK").save(folder / name / "cmyk.jpg")
    _drawing(50, scale=20).save(folder / "red/large.jpg")
    paths = sorted(folder.rglob("*.*"))
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    images = [opened(path) for path in paths]
    wanted = module.predict(images)
    assert [image.size for image in images] == [opened(path).size for path in paths]  # the caller's are as they were

    main(["predict", f"--ckpt_path={checkpoint}", *map(str, paths), "--output=rows.jsonl", "--feature_precision=fp32"])
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    found = torch.tensor([[row["top"][name] for name in module.class_names] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)

    main(["export", f"--ckpt_path={checkpoint}", "--output=model.onnx"])
    by_script = by_the_documented_script(paths, monkeypatch, capsys)
    assert [label for label, _ in by_script] == [row["label"] for row in rows]
    assert [share for _, share in by_script] == pytest.approx(wanted.max(dim=1).values.tolist(), abs=1e-3)

    own = {"feature_precision": "fp32"}
    for data in (ImageFolderData(str(folder), **own), DatasetData(Lazy(paths), **own)):
        data.store.load(module.backbone, torch.device("cpu"))
        with torch.no_grad():  # in the order of the paths, both
            logits = module.head(data.store.matrix(data.store.items).whole())
        torch.testing.assert_close((logits / module.task.temperature).softmax(dim=1), wanted, rtol=0, atol=1e-3)


def test_a_program_of_torch_needs_nothing_else(checkpoint):
    result = main(["export", f"--ckpt_path={checkpoint}", "--output=model.pt2"])
    assert result["difference"] < 1e-4
    extra = {"class_names": "", "preprocessing": ""}
    program = torch.export.load("model.pt2", extra_files=extra)
    assert json.loads(extra["class_names"]) == ["blue", "green", "red"]
    for count in (1, 5):
        found = program.module()(images()[:count])
        torch.testing.assert_close(found, probabilities(checkpoint)[:count], rtol=0, atol=1e-5)


def test_an_export_in_int8_is_as_good_on_all_validation_images(checkpoint, kept, refused, monkeypatch, capsys):
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    result = main(["export", f"--ckpt_path={checkpoint}", "--output=model.int8.onnx"])
    assert result["images"] == 17
    assert result["int8/acc"] == result["fp32/acc"] == 1
    shown = capsys.readouterr().out
    assert re.search(r"fp32: +.* MB, .* ms per image, accuracy 1.0000 on 17 images", shown)
    assert re.search(r"int8: +.* MB, .* ms per image, accuracy 1.0000 on 17 images", shown)
    # The documented script runs it, and decodes as it should.
    Path("model.int8.onnx").rename("model.onnx")
    expected = json.loads(Path("model.int8.onnx.check/expected.json").read_text())
    names, wanted = expected["class_names"], expected["probabilities"]
    assert names == module.class_names
    paths = [Path("model.int8.onnx.check") / name for name in wanted]
    for (label, probability), row in zip(
        by_the_documented_script(paths, monkeypatch, capsys), wanted.values(), strict=True
    ):
        assert names.index(label) == np.argmax(row)
        assert probability == pytest.approx(max(row), abs=expected["tolerance"])
    # Refused: one that loses too much, and a head without images.
    monkeypatch.setattr(exporting, "to_int8_onnx", lambda module, quantised: one_sided(module))
    line = refused("export", f"--ckpt_path={checkpoint}", "--output=bad.int8.onnx")
    assert re.search("int8 loses 1. of 17 images; not written", line)
    assert not Path("bad.int8.onnx").exists()
    alone = Path("alone/head.ckpt")
    alone.parent.mkdir()
    alone.write_bytes(checkpoint.read_bytes())
    assert "--data.root is missing" in refused("export", f"--ckpt_path={alone}", "--output=bad.int8.onnx")


def one_sided(module: TransferClassifier) -> bytes:
    """An ONNX file that gives each image the first class."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    return to_onnx(other)
