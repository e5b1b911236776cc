"""Every command and every piece of Python in the README runs.

A block is tagged with how: `fast` runs here, `slow` under `-m slow`, `install` is what `.ci/run` and the packaging test
do, `benchmark` is a script whose figures the README holds: its parts run in a small form.
"""

import re
import shutil

import pytest

from support import REPOSITORY, draw

BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def tagged(language: str, tag: str) -> list[str]:
    return [text for found, given, text in BLOCKS if found == language and given == tag]


@pytest.mark.parametrize("block", tagged("bash", "fast"))
def test_commands(block, run):
    done = run("bash", "-euo", "pipefail", "-c", block)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("block", tagged("bash", "slow"))
def test_slow_commands(block, run):
    assert run("bash", "-euo", "pipefail", "-c", block).returncode == 0


@pytest.mark.parametrize("block", tagged("python", "fast"))
def test_python(block, run):
    done = run("python", "-c", block)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.wing("deploy")
def test_exported_models_give_the_labels_of_the_head(run, copy):
    """On all of the demo's test images: the ONNX file by the script above, the weights by torchvision alone."""
    import csv

    import numpy as np
    import torch

    from headstart import TransferClassifier
    from headstart.images import decode, preprocess

    done = run("bash", "-c", "python train.py --report=false && ls logs/clipart/*/checkpoints/best.ckpt")
    checkpoint = copy / done.stdout.splitlines()[-1]
    for output in ("model.onnx", "resnet18.pth"):
        done = run("headstart", "export", f"--ckpt_path={checkpoint}", f"--output={output}")
        assert done.returncode == 0, done.stderr[-3000:]
    with (checkpoint.parent.parent / "splits.csv").open(newline="") as file:
        paths = [copy / "data/clipart" / row["path"] for row in csv.DictReader(file) if row["split"] == "test"]
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    how = module.backbone.preprocessing
    images = torch.stack([preprocess(decode(path.read_bytes(), how), how) for path in paths])
    with torch.no_grad():
        wanted = (module(images) / module.temperature).softmax(dim=1)
    best = wanted.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert len(paths) == 94

    (script,) = tagged("python", "export")
    done = run("python", "-c", script, *map(str, paths))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" ", 2) for line in done.stdout.splitlines()]
    labels = torch.tensor([module.class_names.index(name) for name, _, _ in rows])
    flips = int((labels != wanted.argmax(dim=1)).sum())
    print(f"onnx: {flips} of {len(paths)} labels differ")
    assert (labels == wanted.argmax(dim=1))[clear].all()
    assert np.allclose([float(row[1]) for row in rows], best[:, 0], atol=1e-4)

    (script,) = tagged("python", "torchvision")
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.save((images / 255 - values[0]) / values[1], copy / "images.pt")
    script += "torch.save(model.eval()(torch.load('images.pt')).argmax(dim=1), 'labels.pt')"
    done = run("python", "-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (torch.load(copy / "labels.pt") == wanted.argmax(dim=1))[clear].all()


def test_the_accuracy_benchmark_in_a_small_form(run, copy):
    for folder in (copy / "data/clipart").iterdir():
        for path in sorted(folder.iterdir())[12:]:
            path.unlink()
    small = ["--splits=1", "--model.image_size=32", "--trainer.max_epochs=1"]
    done = run("python", "benchmarks/accuracy.py", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| bundled | 0." in done.stdout


def test_the_speed_benchmark_in_a_small_form(run, copy, tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / "photos" / split, images=4)
    done = run("python", "benchmarks/speed.py", str(tmp_path / "photos"), "--epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "times faster than plain" in done.stdout
    shutil.rmtree(tmp_path / "photos")


@pytest.mark.wing("finetune")
def test_the_fine_tuning_benchmark_in_a_small_form(run, copy, tmp_path):
    for split in ("train", "val"):
        draw(tmp_path / "photos" / split, images=5, seed=len(split))
    small = ["--splits=1", "--trainer.max_epochs=1"]
    done = run("python", "benchmarks/finetune.py", str(tmp_path / "photos"), *small)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("head alone", "layer4", "all layers", "whole network from random weights"):
        assert f"\n| {row} | " in done.stdout


@pytest.mark.wing("audit")
def test_the_label_benchmark_in_a_small_form(run, copy):
    done = run("python", "benchmarks/labels.py", str(draw(copy / "photos", images=12)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| headstart check | " in done.stdout


@pytest.mark.wing("fewshot")
def test_the_fewshot_benchmarks_in_a_small_form(run, copy):
    for number in range(16):
        shade = (16 * number, 255 - 16 * number, 128)
        draw(copy / "classes", images=16, seed=number, colours={f"class{number:02}": shade})
    options = ["--data.source=folder", f"--data.root={copy / 'classes'}"]
    small = [
        "--n_way=2",
        "--n_query=8",
        "--episodes=20",
        "--max_epochs=1",
        "--data.train_episodes=20",
        "--data.val_episodes=20",
    ]
    done = run("python", "benchmarks/fewshot.py", "heads", *options, *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| projection (trained) | " in done.stdout
    done = run("python", "benchmarks/fewshot.py", "tool", str(copy / "classes"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| linear, AdamW, 25 epochs | | " in done.stdout


@pytest.mark.wing("fewshot")
def test_the_fewshot_times_in_a_small_form(run, copy):
    pytest.importorskip("easyfsl", reason="of the benchmark alone: pip install easyfsl")
    for number in range(30):
        draw(copy / "classes", images=20, seed=number, colours={f"class{number:02}": (8 * number, 100, 128)})
    options = ["--data.source=folder", f"--data.root={copy / 'classes'}"]
    done = run("python", "benchmarks/fewshot.py", "times", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "episodes of another accuracy: 0" in done.stdout


def test_the_scale_benchmarks_in_a_small_form(run, copy, tmp_path):
    done = run("python", "benchmarks/scale.py", "rows", "6000")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "peak anonymous memory" in done.stdout
    for folder in (copy / "data/clipart").iterdir():
        for path in sorted(folder.iterdir())[12:]:
            path.unlink()
    done = run("python", "benchmarks/scale.py", "heads")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "64 heads take" in done.stdout
