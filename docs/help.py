"""Writes the short help of each command to src/headstart/help, so that `--help` answers without importing torch.

usage: python docs/help.py
"""

import contextlib
import io
from importlib import import_module
from pathlib import Path

from headstart.cli import HELP, VERBS


def help_of(verb: str) -> str:
    """What the command's own parser prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(import_module(f"headstart.verbs.{verb}"), verb)(["--help"])
    return shown.getvalue()


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for verb in VERBS:
        (HELP / f"{verb}.txt").write_text(help_of(verb), encoding="utf-8")
        print(Path(HELP.name, f"{verb}.txt"))
