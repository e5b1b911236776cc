"""Gives the template your own name: package, command, environment variables, documents, tests.

usage: python rename.py NAME

NAME is what you will import. Run it once, in a checkout without uncommitted changes. Existing checkpoints and caches
stay where they are, and are not read under the new name.
"""

import importlib.util
import keyword
import re
import subprocess
import sys
from pathlib import Path

OLD = "headstart"
ROOT = Path(__file__).resolve().parent
LEFT_ALONE = {"logs", "build", "dist", "__pycache__"}
OWN_HIDDEN = {".ci", ".github", ".gitignore", ".editorconfig", ".pre-commit-config.yaml"}


def problem(name: str) -> str | None:
    """Why the name cannot be used; None if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return f"{name}: is not a valid package name; use lower-case letters, digits and _"
    if name == OLD or importlib.util.find_spec(name):
        return f"{name}: a package of this name is installed; choose another"
    return uncommitted()


def uncommitted() -> str | None:
    """Why the checkout is not ready to be changed by a script; None if it is."""
    if not (ROOT / ".git").exists():
        return None
    changed = subprocess.check_output(["git", "-C", ROOT, "status", "--porcelain"], text=True).splitlines()
    if changed:
        return (
            f"{changed[0][3:]} is changed or new; commit or move it first, so that `git diff` shows what the script did"
        )
    return None


def files() -> list[Path]:
    """The project's own files: no hidden ones but ``OWN_HIDDEN``, no environments, no build outputs."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in OWN_HIDDEN for part in parts)
        environment = any((parent / "pyvenv.cfg").exists() for parent in path.parents if parent.is_relative_to(ROOT))
        built = not LEFT_ALONE.isdisjoint(parts) or any(part.endswith(".egg-info") for part in parts)
        if path.is_file() and not (hidden or environment or built):
            found.append(path)
    return found


def rename(name: str) -> int:
    """Replaces the name in every text file; returns how many changed."""
    changed = 0
    for path in files():
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:  # a picture, weights
            continue
        renamed = text.replace(OLD, name).replace(OLD.upper(), name.upper())
        if renamed != text:
            path.write_bytes(renamed.encode())
            changed += 1
    (ROOT / "src" / OLD).rename(ROOT / "src" / name)
    return changed


def tidy() -> None:
    """Sorts imports, removes unused ones and reformats the code, if ruff is installed."""
    if importlib.util.find_spec("ruff"):
        for command in (["check", "--quiet", "--fix", "--select=I,F401"], ["format", "--quiet"]):
            subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if why := problem(sys.argv[1]):
        sys.exit(f"error: {why}")
    count = rename(sys.argv[1])
    tidy()  # the new name changes the order of imports and the length of lines
    print(f"renamed: {OLD} to {sys.argv[1]}, in {count} files")
    print("next:    pip install -e '.[dev]' && pytest")
