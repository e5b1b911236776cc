"""Every command and every piece of Python in the README and in docs/ runs.

A page is one script: its blocks run from top to bottom in a fresh copy of the repository, as a reader would type them,
so a page trains once and its later blocks use that run. A block is tagged with how: `fast` runs here, `slow` under
`-m slow`, `install` is what `.ci/run` and the packaging test do, `benchmark` is a script whose figures the page holds:
it runs in a small form. `export`, `torchvision` and `example` have tests of their own below. `output` is not run.
`make-it-yours.md` changes the code, and has its own file of tests.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchvision import models

from headstart.cli import VERBS
from support import PAGES, REPOSITORY, blocks, draw, mypy_cache

(HOOKS,) = (group["hooks"] for group in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"])


def script(page: str, tag: str) -> str:
    """The page's blocks as one script for bash, which shows what it does."""
    steps = []
    for number, block in enumerate(blocks(page, tag=tag)):
        step = block.text
        if block.language == "python":
            step = f"cat > block{number}.py <<'END'\n{block.text}END\npython block{number}.py\n"
        steps.append(f": {page}, block {number}\n{step}")
    return "".join(steps)


def run_page(page: str, tag: str, run) -> str:
    done = run("bash", "-euxo", "pipefail", "-c", script(page, tag))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, tag="fast")])
def test_a_page(page, run):
    run_page(page, "fast", run)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, tag="slow")])
def test_a_page_that_takes_its_time(page, run):
    run_page(page, "slow", run)


def test_the_article_runs_as_it_is_printed(copy, run, tmp_path):
    """With random weights where torchvision's download would lie; torchvision takes them without a look."""
    place = tmp_path / "torch/hub/checkpoints"
    place.mkdir(parents=True)
    torch.save(models.resnet18().state_dict(), place / Path(models.ResNet18_Weights.IMAGENET1K_V1.url).name)
    for path in copy.glob("path/to/photos/*/*"):
        if int(path.stem) > 3:
            path.unlink()
    (block,) = blocks("article", tag="example")
    done = run("env", f"TORCH_HOME={tmp_path / 'torch'}", "bash", "-euc", block.text)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 4: " in done.stdout
    assert (copy / "model.pth").stat().st_size > 40_000_000


def test_the_notebook_runs_and_keeps_its_outputs(copy, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(copy / "src"))
    path = copy / "examples/quickstart.ipynb"
    kept = json.loads(path.read_text())
    command = [str(Path(sys.executable).parent / "jupyter-execute"), "--inplace", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for before, now in zip(kept["cells"], json.loads(path.read_text())["cells"], strict=True):
        assert before["source"] == now["source"]
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (before, now)]
        assert kinds[0] == kinds[1]


def test_the_short_help_is_that_of_the_parsers(copy, run):
    """Without the lines whose texts are Lightning's and jsonargparse's."""

    def kept() -> dict[str, list[str]]:
        others = re.compile("  --(trainer[.]|help|config|print_config)")
        texts = {path.stem: path.read_text().splitlines() for path in (copy / "src/headstart/help").glob("*.txt")}
        return {verb: [line for line in lines if not others.match(line)] for verb, lines in texts.items()}

    before = kept()
    assert set(before) == set(VERBS)
    done = run("python", "docs/help.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert before == kept(), "run `python docs/help.py`"
    assert all(len(lines) > 3 for lines in before.values())


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_passes(hook, tmp_path):
    """Its command, as pre-commit runs it."""
    files = ["src", "tests"] if hook.get("pass_filenames", True) else []
    program, *options = hook["entry"].split()
    command = [str(Path(sys.executable).parent / program), *options, *files]
    with mypy_cache():
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert hook["language"] == "system"


@pytest.mark.slow
def test_the_pictures_are_made(copy, run, tmp_path):
    done = run("python", "docs/pictures.py", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr[-3000:]
    for kept in sorted((REPOSITORY / "docs/pictures").iterdir()):
        assert (tmp_path / "made/docs/pictures" / kept.name).stat().st_size > kept.stat().st_size / 2
    assert str(tmp_path) not in (tmp_path / "made/examples/quickstart.ipynb").read_text()


@pytest.mark.wing("deploy")
def test_exported_models_give_the_labels_of_the_head(run, copy):
    """On all of the demo's test images: the ONNX file by the script above, the weights by torchvision alone."""
    import csv

    import numpy as np

    from headstart import TransferClassifier
    from headstart.decoding import decode
    from headstart.images import preprocess

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
        wanted = (module(images) / module.task.temperature).softmax(dim=1)
    best = wanted.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert len(paths) == 94

    (block,) = blocks("deploy", "python", "export")
    done = run("python", "-c", block.text, *map(str, paths))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" ", 2) for line in done.stdout.splitlines()]
    labels = torch.tensor([module.class_names.index(name) for name, _, _ in rows])
    flips = int((labels != wanted.argmax(dim=1)).sum())
    print(f"onnx: {flips} of {len(paths)} labels differ")
    assert (labels == wanted.argmax(dim=1))[clear].all()
    assert np.allclose([float(row[1]) for row in rows], best[:, 0], atol=1e-4)

    (block,) = blocks("deploy", "python", "torchvision")
    values = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.save((images / 255 - values[0]) / values[1], copy / "images.pt")
    label = "torch.save(model.eval()(torch.load('images.pt')).argmax(dim=1), 'labels.pt')"
    done = run("python", "-c", block.text + label)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (torch.load(copy / "labels.pt") == wanted.argmax(dim=1))[clear].all()


def test_the_accuracy_benchmark_in_a_small_form(run, copy):
    for folder in (copy / "data/clipart").iterdir():
        for path in sorted(folder.iterdir())[12:]:
            path.unlink()
    small = ["--splits=1", "--model.image_size=32", "--trainer.max_epochs=1"]
    done = run("python", "benchmarks/accuracy.py", *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| resnet18, bundled, `layers=all` | 0." in done.stdout


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


def test_the_benchmark_of_trust_in_a_small_form(run, copy):
    colours = {name: (number * 50, 120, 200 - 30 * number) for number, name in enumerate("abcdef")}
    small = ["--splits=3", "--others=0"]
    done = run("python", "benchmarks/trust.py", str(draw(copy / "photos", images=25, colours=colours)), *small)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| mean of the pairs | " in done.stdout
    assert "\n| photos: 6 classes, " in done.stdout


@pytest.mark.wing("audit")
def test_the_label_benchmark_in_a_small_form(run, copy):
    done = run("python", "benchmarks/labels.py", str(draw(copy / "photos", images=12)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| headstart check | " in done.stdout


@pytest.mark.wing("domains")
def test_the_domain_benchmark_in_a_small_form(run, copy):
    done = run("python", "benchmarks/domains.py", "path/to/world", "--model.weights=bundled")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"sketch +headstart [01]\.\d+  scikit-learn [01]\.\d+", done.stdout)


@pytest.mark.wing("label")
def test_the_labelling_benchmark_in_a_small_form(run, copy):
    done = run("python", "benchmarks/label.py", str(draw(copy / "photos", images=12)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| headstart next | " in done.stdout
    done = run("python", "benchmarks/label.py", "rows", "3000")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| `next`: 50 more, given 50 labels | " in done.stdout


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
    options = ["--data.source=folder", f"--data.root={draw(copy / 'few', images=6)}"]
    done = run("python", "benchmarks/fewshot.py", "saved", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\n| scikit-learn's NearestCentroid | " in done.stdout


@pytest.mark.wing("fewshot")
def test_the_fewshot_times_in_a_small_form(run, copy):
    pytest.importorskip("easyfsl", reason="of the benchmark alone: pip install easyfsl")
    for number in range(30):
        draw(copy / "classes", images=20, seed=number, colours={f"class{number:02}": (8 * number, 100, 128)})
    options = ["--data.source=folder", f"--data.root={copy / 'classes'}"]
    done = run("python", "benchmarks/fewshot.py", "times", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "episodes that differ in accuracy: 0" in done.stdout


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
