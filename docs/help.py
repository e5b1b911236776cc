"""Writes what must be known without importing torch to src/headstart/help: short helps, and the defaults of runs.

usage: python docs/help.py
"""

import contextlib
import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from headstart.cli import HELP, VERBS
from headstart.files import flat
from headstart.model.weights import DEMO
from headstart.runs.history import DEFAULTS


def help_of(verb: str) -> str:
    """What the command's own parser prints, on any machine."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(import_module(f"headstart.verbs.{verb}"), verb)(["--help"])
    return shown.getvalue().replace(str(DEMO), "the demo")


def defaults_of(verb: str) -> dict[str, Any]:
    """The command's settings if nothing is given, by dotted name."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        getattr(import_module(f"headstart.verbs.{verb}"), verb)(["--print_config"])
    found = flat(yaml.safe_load(shown.getvalue()))
    return {name: value for name, value in found.items() if name != "data.root"}  # where the demo lies here


if __name__ == "__main__":
    HELP.mkdir(exist_ok=True)
    for verb in VERBS:
        (HELP / f"{verb}.txt").write_text(help_of(verb), encoding="utf-8")
        print(Path(HELP.name, f"{verb}.txt"))
    defaults = {verb: defaults_of(verb) for verb in ("train", "finetune") if verb in VERBS}
    DEFAULTS.write_text(json.dumps(defaults, indent=0), encoding="utf-8")
