"""Removes wings from the template: their packages, commands, tests, documents, recipes and dependencies.

usage: python trim.py WING…         one or more of: {wings}
       python trim.py --keep=train  all of them; train, tune, evaluate, runs and cache stay

The checkout must have no uncommitted changes. A wing's own files are listed in this script. In all other files these
are removed: the part between the comments `wing: NAME` and `/wing`, each on a line of its own; a line that ends in the
comment `wing: NAME`; a test marked with the name. Parts marked `any`, and this script, are removed with the last wing.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

from rename import ROOT, files, tidy, uncommitted

PACKAGE = next((ROOT / "src").glob("*/cli.py")).parent
# The commands of each wing, and its files outside its own folders in the package and in tests/.
WINGS = {
    "fewshot": (("fewshot",), ("configs/fewshot.yaml", "benchmarks/fewshot.py", "docs/fewshot.md")),
    "audit": (("check",), ("benchmarks/labels.py",)),
    "domains": (("domains",), ("benchmarks/domains.py", "docs/domains.md")),
    "deploy": (("predict", "export", "demo"), ("docs/deploy.md", "tests/journeys/test_demo_page.py")),
    "label": (
        ("embed", "similar", "next", "label"),
        ("benchmarks/label.py", "docs/label.md", "tests/journeys/test_labelling.py"),
    ),
    "finetune": (("finetune",), ("benchmarks/finetune.py", "docs/finetune.md")),
}
PART = re.compile(r"^ *(?:#|<!--) wing: (\w+)(?: -->)?\n.*?^ *(?:#|<!--) /wing(?: -->)?\n", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^.*(?:#|<!--) wing: (\w+)(?: -->)?\n", re.MULTILINE)


def remove_files(wing: str) -> None:
    """Removes the wing's own files and folders."""
    verbs, others = WINGS[wing]
    own = [PACKAGE / wing, ROOT / "tests" / wing, *(PACKAGE / "verbs" / f"{verb}.py" for verb in verbs)]
    helps = [PACKAGE / "help" / f"{verb}.txt" for verb in verbs]
    for path in (*own, *helps, *(ROOT / name for name in others)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def without(text: str, wings: set[str], suffix: str) -> str:
    """A file's text without the parts that belong to the wings."""
    for pattern in (PART, LINE):
        text = pattern.sub(lambda found: "" if found[1] in wings else found[0], text)
    return without_tests(text, wings) if suffix == ".py" else text


def without_tests(text: str, wings: set[str]) -> str:
    """Python source without the functions and classes that are marked with one of the wings."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
        named = {
            name for mark in marks for name in re.findall(r"'(\w+)'", mark) if mark.startswith("pytest.mark.wing(")
        }
        if named & wings:
            first = min(mark.lineno for mark in node.decorator_list)  # type: ignore[attr-defined]
            del lines[first - 1 : node.end_lineno]
    return "".join(lines)


def trim(wings: set[str]) -> None:
    """Removes the wings."""
    for wing in wings:
        remove_files(wing)
    if not any((PACKAGE / wing).exists() for wing in WINGS):  # no wing is left
        wings = wings | {"any"}
        Path(__file__).unlink()
        (PACKAGE / "serving.py").unlink(missing_ok=True)  # of pages, which are in wings alone
        (ROOT / "tests/journeys/test_trim.py").unlink(missing_ok=True)
    for path in files():
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".jinja", "") and path != Path(__file__).resolve():
            text = path.read_bytes().decode()
            if (trimmed := without(text, wings, path.suffix)) != text:
                path.write_bytes(trimmed.encode())
    tidy()


if __name__ == "__main__":
    given = sys.argv[1:]
    if not given or {"-h", "--help"} & set(given):
        sys.exit(__doc__.format(wings=", ".join(WINGS)))
    chosen = set(WINGS) if given == ["--keep=train"] else set(given)
    if unknown := sorted(chosen - set(WINGS)):
        sys.exit(f"error: {unknown[0]}: no such wing; choose from {', '.join(WINGS)}")
    if gone := sorted(wing for wing in chosen if not (PACKAGE / wing).exists()):
        if given != ["--keep=train"]:
            sys.exit(f"error: {gone[0]}: already removed")
        chosen -= set(gone)
    if why := uncommitted():
        sys.exit(f"error: {why}")
    trim(chosen)
    print(f"removed: {', '.join(sorted(chosen)) or 'nothing'}")
    print("next:    git diff --stat, pip install -e '.[dev]' && pytest")
