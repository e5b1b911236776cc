"""Each change of docs/make-it-yours.md, made on a copy of the repository; the copy is checked like the project."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support import REPOSITORY

TEXT = (REPOSITORY / "docs/make-it-yours.md").read_text()
# The copy that was renamed runs these tests too.
OTHER = next(name for name in ("mylab", "yourlab") if importlib.util.find_spec(name) is None)
Run = Callable[..., subprocess.CompletedProcess[str]]
PLAINLY = "-q", "--no-deps", "--no-build-isolation"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def change(copy: Path, section: str) -> None:
    """Makes the section's new files and replaces its lines."""
    for kind, name, text in re.findall(r"^```(\w+) (\S+)\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE):
        path = copy / name
        if kind == "python":
            assert not path.exists()
            path.write_text(text)
            continue
        assert kind == "diff"
        lines = text.splitlines()
        assert all(line[0] in " +-" for line in lines)
        before, after = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
        content = path.read_text()
        assert content.count(before) == 1, f"{name} does not hold once: {before}"
        path.write_text(content.replace(before, after))


def result(copy: Path, name: str) -> tuple[dict, Path]:
    file = max((copy / "logs" / name).glob("*/result.json"))
    return json.loads(file.read_text()), file.parent


def check_head(copy: Path, run: Run) -> None:
    scores, folder = result(copy, "deep")
    assert scores["test/acc"] == 1.0
    best = folder / "checkpoints/best.ckpt"
    content = torch.load(best, weights_only=True)
    assert content["hyper_parameters"]["head"] == "deep"
    assert content["state_dict"]["head.hidden.0.weight"].shape == (256, 512)
    # wing: deploy
    assert (copy / "rows.csv").read_text().count("red") == 2 * 20  # path and label
    done = run("headstart", "export", f"--ckpt_path={best}", "--output=model.pth")
    assert done.returncode == 2
    assert "this needs --model.head=linear, but the checkpoint has a Deep" in done.stderr
    done = run("headstart", "export", f"--ckpt_path={best}", "--output=model.onnx")
    assert done.returncode == 0, done.stderr
    # /wing
    # wing: finetune
    done = run("headstart", "finetune", f"--ckpt_path={best}", "--trainer.max_epochs=1", "--report=false")
    assert done.returncode == 0, done.stderr
    # /wing


def check_backbone(copy: Path, run: Run) -> None:
    scores, folder = result(copy, "photos")
    assert scores["backbone"] == "tiny"
    assert scores["test/acc"] > 0.5  # of 3 classes: colours show in random features too
    state = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert state["head.weight"].shape == (3, 256)


def check_data(copy: Path, run: Run) -> None:
    scores, folder = result(copy, "flat")
    assert scores["test/acc"] == 1.0
    assert scores["classes"] == 3
    assert "red.000.png" in (folder / "splits.csv").read_text()
    (evaluated,) = (copy / "logs/flat-evaluate").glob("*/result.json")
    assert json.loads(evaluated.read_text())["images"]["test"] == 60
    assert list((copy / "logs/flat-check").glob("*/check.csv"))  # wing: audit


def check_verb(copy: Path, run: Run) -> None:
    assert (copy / "classes.txt").read_text() == "0 blue\n1 green\n2 red\n"
    assert "classes   list the class names of a trained head" in run("headstart", "--help").stdout
    assert "--ckpt_path is missing" in run("headstart", "classes").stderr


def check_metric(copy: Path, run: Run) -> None:
    scores, folder = result(copy, "photos")
    assert scores["test/top2"] >= scores["test/acc"]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert "val/top2" in events.Tags()["scalars"]


def check_figure(copy: Path, run: Run) -> None:
    _, folder = result(copy, "photos")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert "test/confidence" in events.Tags()["images"]
    assert 'aria-label="confidence"' in (folder / "report.html").read_text()


CHECKS = {
    "Another head": check_head,
    "Another backbone": check_backbone,
    "Another kind of data": check_data,
    "Another command": check_verb,
    "Another metric": check_metric,
    "Another figure": check_figure,
}


@pytest.mark.parametrize("section", CHECKS)
def test_a_change_works(section, copy, run):
    change(copy, section)
    for block in re.findall(r"^```bash\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE):
        done = run("bash", "-euo", "pipefail", "-c", block)
        assert done.returncode == 0, done.stderr[-3000:]
    CHECKS[section](copy, run)
    files, lines = (len(re.findall(start, SECTIONS[section], re.MULTILINE)) for start in ("^```python", r"^\+"))
    print(f"{section}: {files} new files, {lines} lines elsewhere")
    for command in (["ruff", "check", "src"], ["ruff", "format", "--check", "src"]):
        done = run(sys.executable, "-m", *command)
        assert done.returncode == 0, done.stdout


def test_every_section_is_checked():
    others = {
        "The name",
        "Less of it",  # wing: any
    }
    assert set(SECTIONS) == {*others, *CHECKS}
    assert "python rename.py mylab" in SECTIONS["The name"]
    assert "python trim.py fewshot audit" in SECTIONS["Less of it"]  # wing: any


def renamed(copy: Path, run: Run) -> str:
    """Gives the copy its other name, a repository, and an environment with the rest of this one; gives its Python."""
    shutil.rmtree(copy / "path")
    done = run(sys.executable, "rename.py", OTHER)
    assert done.returncode == 0, done.stderr
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "renamed"]):
        subprocess.run(["git", "-C", str(copy), *command], check=True)
    environment = copy.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    (packages,) = environment.glob("lib/python*/site-packages")
    # Every folder of packages, since the .pth files of a folder that is added so are not read.
    (packages / "rest.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    (environment / "bin/ruff").symlink_to(Path(sys.executable).parent / "ruff")
    done = run(sys.executable, "-m", "pip", "--python", str(python), "install", *PLAINLY, "-e", ".")
    assert done.returncode == 0, done.stderr
    return str(python)


def test_the_name_is_changed_everywhere(copy, run):
    python = renamed(copy, run)
    left = subprocess.run(
        ["git", "-C", str(copy), "grep", "-il", "headstart"], capture_output=True, text=True, check=False
    )
    assert left.stdout == ""
    assert not (copy / "src/headstart").exists()
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = run(sys.executable, "-m", *command)
        assert done.returncode == 0, done.stdout
    done = run(python, "-m", "pytest", "-q", "-n0", "tests/model/test_classifier.py", "tests/runs")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_the_whole_suite_passes_under_the_other_name(copy, run):
    python = renamed(copy, run)
    done = run(python, "-m", "pytest", "-q")
    assert done.returncode == 0, done.stdout[-3000:]
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "said"), [("My-Lab", "lower-case letters"), ("torch", "a package of this name"), ("class", "lower-case")]
)
def test_a_name_that_cannot_be_is_refused(name, said, copy, run):
    done = run(sys.executable, "rename.py", name)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (copy / "src/headstart").exists()


def test_changes_have_to_be_committed_first(copy, run):
    subprocess.run(["git", "-C", str(copy), "init", "-q"], check=True)
    done = run(sys.executable, "rename.py", OTHER)
    assert done.returncode == 1
    assert "commit or move it first" in done.stderr
