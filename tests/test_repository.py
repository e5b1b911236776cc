"""What the repository promises about itself."""

import re

import pytest
import rename

import headstart
from support import REPOSITORY

BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
TAGS = {"export", "torchvision", "fast", "slow", "install", "benchmark", "output"}


def tagged(language: str, tag: str) -> list[str]:
    return [text for found, given, text in BLOCKS if found == language and given == tag]


def test_every_block_is_tagged():
    assert BLOCKS
    assert {tag for _, tag, _ in BLOCKS} <= TAGS
    assert {language for language, _, _ in BLOCKS} <= {"bash", "python", "text"}


def test_the_test_command_is_what_ci_runs():
    install = "\n".join(tagged("bash", "install"))
    line = "pip install -e '.[dev]' && pytest"
    assert line in install
    assert line in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "benchmarks").glob("*.py")))
def test_every_benchmark_is_in_the_readme(script):
    assert any(f"benchmarks/{script}" in block for block in tagged("bash", "benchmark"))


def test_the_changelog_knows_this_version():
    assert f"## {headstart.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_floor_says_why():
    text = (REPOSITORY / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert dependencies
    for line in dependencies[1].splitlines():
        assert re.search(r">=[\d.]+.*\",  # \w", line), line


def test_the_constraints_are_the_versions_tested_and_fit_the_floors():
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name in ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorboard", "jsonargparse"):
        assert name in pinned


def test_the_demo_data_is_as_described():
    folders = sorted((REPOSITORY / "data/clipart").iterdir())
    assert len(folders) == 12
    assert sum(len(list(folder.glob("*.png"))) for folder in folders) == 590


def test_no_path_of_a_machine_is_in_the_tree():
    for path in rename.files():
        if path.suffix in (".py", ".md", ".yaml", ".toml") or path.name == "run":
            assert not re.search(r"(?<![\w.])/(home|root|Users)/", path.read_text()), path
