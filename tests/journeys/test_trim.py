"""Each wing is removed from a copy, and all of them; what is left is whole."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import dead_links, mypy_cache

trim = importlib.import_module("trim")
WINGS = sorted(wing for wing in trim.WINGS if (trim.PACKAGE / wing).exists())
PACKAGE = trim.PACKAGE.name


def trimmed(copy: Path, run, *arguments: str) -> None:
    done = run("python", "trim.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "next:" in done.stdout


@pytest.mark.parametrize("arguments", [*([wing] for wing in WINGS), ["--keep=train"]], ids=" ".join)
def test_what_is_left_is_whole(arguments, copy, run):
    trimmed(copy, run, *arguments)
    gone = WINGS if arguments == ["--keep=train"] else arguments
    verbs = {verb for wing in gone for verb in trim.WINGS[wing][0]}
    for wing in gone:
        assert not (copy / "src" / PACKAGE / wing).exists()
        assert not (copy / "tests" / wing).exists()
    names = "|".join(gone if len(gone) < len(WINGS) else [*gone, "any"])
    left = subprocess.run(["grep", "-rnE", f"wing: ({names})", str(copy)], capture_output=True, text=True, check=False)
    assert left.stdout == ""
    assert dead_links(copy) == []
    for page in [copy / "README.md", *(copy / "docs").glob("*.md")]:
        assert not re.search(rf"{PACKAGE} ({'|'.join(verbs)})\b", page.read_text()), page
    module = [sys.executable, "-m"]
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = run(*module, *command)
        assert done.returncode == 0, done.stdout[-3000:]
    with mypy_cache() as cache:
        done = run(*module, "mypy", f"--cache-dir={cache}")
    assert done.returncode == 0, done.stdout[-3000:]
    done = run("lint-imports")
    assert done.returncode == 0, done.stdout[-3000:]
    shown = run(PACKAGE, "--help").stdout
    for verb in re.findall(r"^  (\w+)", shown, re.MULTILINE):
        assert verb not in verbs
        assert f"{PACKAGE} {verb} " in run(PACKAGE, verb, "--help").stdout
    for verb in verbs:
        assert "no such command" in run(PACKAGE, verb).stderr
    done = run("python", "train.py", "--data.root=path/to/photos", "--trainer.max_epochs=2", "--model.image_size=32")
    assert done.returncode == 0, done.stderr[-3000:]
    done = run("python", "-m", "pytest", "-q", "-n0", "--collect-only", "-m", "not slow")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_smallest_template_trains_the_demo_and_passes_its_tests_of_runs(copy, run):
    trimmed(copy, run, "--keep=train")
    lines = sum(len(path.read_text().splitlines()) for path in (copy / "src").rglob("*.py"))
    print(f"\nsrc/ has {lines} lines left")
    assert lines < 10_800
    done = run("python", "train.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{PACKAGE} predict" not in done.stdout
    done = run(sys.executable, "-m", "pytest", "-q", "-n0", "tests/runs", "tests/model/test_heads.py")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [*([wing] for wing in WINGS), ["--keep=train"]], ids=" ".join)
def test_the_tests_that_are_left_pass(arguments, copy, run):
    trimmed(copy, run, *arguments)
    done = run(sys.executable, "-m", "pytest", "-q")
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_wing_and_changes_are_refused(copy, run):
    done = run("python", "trim.py", "attic")
    assert done.returncode == 1
    assert "attic: no such wing" in done.stderr
    for wing in WINGS:
        assert wing in run("python", "trim.py").stderr
    subprocess.run(["git", "-C", str(copy), "init", "-q"], check=True)
    assert "commit or move it first" in run("python", "trim.py", *WINGS[:1]).stderr
    assert (copy / "src" / PACKAGE / WINGS[0]).exists()
