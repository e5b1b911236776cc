"""What the repository promises about itself."""

import re

import pytest
import rename
import yaml
from PIL import Image

import headstart
from support import PAGES, REPOSITORY, blocks, dead_links

TAGS = {"export", "torchvision", "example", "fast", "slow", "install", "benchmark", "output"}
PICTURES = sorted(path for path in (REPOSITORY / "docs/pictures").iterdir())


def test_the_readme_can_be_read_in_one_go():
    assert len(PAGES["README"].read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if page != "make-it-yours"])
def test_every_block_says_how_it_is_run(page):
    fences = PAGES[page].read_text().count("\n```")
    assert len(blocks(page)) * 2 == fences
    for block in blocks(page):
        assert block.language == "mermaid" or (block.language in ("bash", "python", "text") and block.tag in TAGS)
        assert block.language != "text" or block.tag == "output"


def test_the_test_command_is_what_ci_runs():
    line = "pip install -e '.[dev]' && pytest"
    assert line in "".join(block.text for block in blocks("README", "bash", "install"))
    assert line in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in (REPOSITORY / "benchmarks").glob("*.py")))
def test_every_benchmark_is_described(script):
    assert any(f"benchmarks/{script}" in block.text for block in blocks("benchmarks", "bash", "benchmark"))


def test_every_link_leads_somewhere():
    assert dead_links(REPOSITORY) == []


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        assert page == "README" or f"(docs/{page}.md" in PAGES["README"].read_text()


def test_the_readme_shows_pictures_of_what_it_describes():
    shown = re.findall(r"!\[[^]]+\]\((docs/pictures/[^)]+)\)", PAGES["README"].read_text())
    assert len(shown) >= 3


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_shown(picture):
    assert picture.stat().st_size < 200_000
    assert any(f"pictures/{picture.name})" in page.read_text() for page in PAGES.values())
    if picture.suffix == ".png":
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) > 200
    else:
        text = picture.read_text()
        assert "<svg" in text
        assert "https://" not in re.sub(r'xmlns[:\w]*="[^"]*"|<!--.*?-->', "", text)  # no remote font


def test_the_changelog_knows_this_version():
    assert f"## {headstart.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_workflow_has_the_commands_of_ci_and_the_versions_that_are_declared():
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]
    linux, others = ([step.get("run", "") for step in jobs[job]["steps"]] for job in ("linux", "others"))
    commands = (REPOSITORY / ".ci/run").read_text().split("\n\n", 2)[2].splitlines()
    assert "pytest -m journey" in commands
    assert {command for command in commands if command} <= set(linux)
    assert {"python train.py", "pytest"} <= set(others)
    assert {"macos-latest", "windows-latest"} == set(jobs["others"]["strategy"]["matrix"]["os"])
    declared = re.findall(r"Python :: (3\.\d+)", (REPOSITORY / "pyproject.toml").read_text())
    assert jobs["linux"]["strategy"]["matrix"]["python"] == declared


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_a_form_asks_for_something(form):
    content = yaml.safe_load((REPOSITORY / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())
    assert {"name", "description", "body"} <= set(content)
    assert all(field["attributes"]["label"] and field["id"] for field in content["body"])


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
        if path.suffix in (".py", ".md", ".yaml", ".yml", ".toml", ".svg", ".ipynb", ".txt") or path.name == "run":
            assert not re.search(r"(?<![\w.])/(home|root|Users)/|/clipart\]", path.read_text()), path
