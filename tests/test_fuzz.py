"""Random combinations of the options of every verb: none ends in a traceback, none hangs."""

import contextlib
import io
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from headstart.cli import VERBS, main
from headstart.parser import SHORT_HELP, OptionParser
from support import COLOURS, at_most

# What makes a command succeed soon, for the verbs that have the option; the random options come later and win.
BASE = {
    "--data.root": "colours",
    "--model.image_size": "32",
    "--report": "false",
    "--trainer.max_epochs": "1",
    "--max_epochs": "1",
    "--episodes": "5",
    "--data.train_episodes": "5",
    "--data.val_episodes": "5",
    "--tune.draws": "2",
    "--n_way": "2",
}
# Values of text, by the end of the option's name; two devices would start this program again.
TEXT = {
    "ckpt_path": ["{best}", "{last}", "last"],
    "backbones": ["resnet18,resnet18@random", "resnet18@random", "resnet18,resnet18@bundled", "resnet18,lenet"],
    "backbone": ["resnet18", "timm/test_vit", "squeezenet1_0", "timm/lenet", "lenet"],
    "weights": ["auto", "bundled", "random", "pretrained", "broken.pth"],
    "accelerator": ["auto", "cpu", "gpu", "tpu", "abacus"],
    "devices": ["1", "auto", "0", "-1", "[]", "[0]"],
    "head": ["linear", "mlp", "cosine", "all"],
    "source": ["folder", "csv"],
    "root": ["colours", "colours/red", "list.csv"],
    "csv": ["list.csv", "new{case}.csv"],
    "splits": ["{splits}", "list.csv"],
    "output": ["new{case}.csv", "new{case}.jsonl", "new{case}.onnx", "new{case}.pth"],
    "unfreeze": ["layer4", "layer4.1", "fc", "all"],
    "sort": ["val/acc", "run", "state"],
    "precision": ["32-true", "bf16-mixed"],
    "image_size": ["32", "64", "31", "2049"],  # the largest take minutes
}
PLACES = ["missing/x", "empty", "fifo", "/dev/zero", "broken.pth", "list.csv", ".."]
PLACES += ["", "null", "a\nb", "\udce9", "[x", "3"]
BEYOND = ["-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "x", "", "null", "true", "[]", "{}"]


def parser_of(verb: str) -> OptionParser:
    """The parser that a verb makes."""

    class Made(Exception):
        pass

    def parse_args(self: OptionParser, *_: object, **__: object) -> None:
        raise Made(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(OptionParser, "parse_args", parse_args)
        with pytest.raises(Made) as made:
            main([verb])
    parser: OptionParser = made.value.args[0]
    return parser


def options_of(parser: OptionParser) -> dict[str, list[str]]:
    """Values of each option, most of them in its range; of the Trainer's, the options of the short help and limits."""
    found = {}
    for action in parser._actions:
        name = next((option for option in action.option_strings if option.startswith("--")), action.dest)
        group, _, key = name.removeprefix("--").partition(".")
        of_trainer = group == "trainer" and key not in SHORT_HELP and not key.startswith("limit_")
        if key == "help" or name in ("--help", "--config", "--print_config") or of_trainer or "-->" in name:
            continue
        found[name] = values_of(getattr(action, "_typehint", None) or action.type, name.split(".")[-1].lstrip("-"))
    return found


def values_of(kind: Any, name: str) -> list[str]:
    """Values of a type, and some beyond it."""
    if name in TEXT:
        return TEXT[name] * (3 * len(PLACES) // len(TEXT[name])) + PLACES
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)] * 4 + ["x", ""]
    if get_origin(kind) is list:
        return ["[]", *(f"[{value}]" for value in values_of(get_args(kind)[0], name)), "[1, 2]", "[0.1, 0.2]"]
    if get_args(kind):  # a union
        return [value for part in get_args(kind) if part is not type(None) for value in values_of(part, name)]
    if kind is bool:
        return ["true", "false"] * 4 + ["maybe"]
    if isinstance(kind, type) and issubclass(kind, int | float):
        bounds = [bound for _, bound in getattr(kind, "_restrictions", [])]
        near = [bound + step for bound in bounds for step in (-1, -0.01, 0, 0.01, 1)]
        usual = ["1", "2", "3"] if issubclass(kind, int) else ["0.1", "0.5", "0.9"]
        return [*usual * 12, *map(str, near), *BEYOND]
    return ["run{case}"] * 3 * len(PLACES) + PLACES


@pytest.fixture
def work(trained: Path, tmp_path: Path) -> dict[str, str]:
    """A folder of good and of bad things; gives the names of those that a run made."""
    for name in ("logs", "cache", "colours"):
        shutil.copytree(trained / name, tmp_path / name)
    Path("empty").mkdir()
    os.mkfifo("fifo")
    Path("broken.pth").write_bytes(b"PK broken")
    lines = [f"colours/{name}/{number:03}.png,{name}" for name in ("red", "blue") for number in range(20)]
    Path("list.csv").write_text("\n".join(["path,label", *lines]))
    run = next(Path("logs").glob("*/*"))
    checkpoints = run / "checkpoints"
    return {"best": f"{checkpoints}/best.ckpt", "last": f"{checkpoints}/last.ckpt", "splits": f"{run}/splits.csv"}


def command(draws: random.Random, verb: str, options: dict[str, list[str]], names: dict[str, str]) -> list[str]:
    """A command line of the verb, with up to four random options, some without dashes."""
    given = {name: value for name, value in BASE.items() if name in options}
    if "--ckpt_path" in options and draws.random() < (0.4 if "--trainer.max_epochs" in options else 0.8):
        given["--ckpt_path"] = "{best}"
    if "--data.source" in options and "--data.csv" not in options:
        given["--data.source"] = "folder"
    if "--output" in options:
        given["--output"] = "new{case}" + draws.choice([".csv", ".pth"])
    words = [f"{name}={value}" for name, value in given.items()]
    for name in draws.sample(sorted(options), min(len(options), draws.randint(0, 4))):
        value = draws.choice(options[name])
        bare = not name.startswith("--")
        words.append(value if bare else f"{name}={value}" if draws.random() < 0.8 else f"{name[2:]}={value}")
    return [verb, *(word.format(**names) if "{}" not in word else word for word in words)]


def outcome(words: list[str]) -> str:
    """How the command ends."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most(60):
                main(words)
        except SystemExit as ended:
            err.flush()
            said = err.buffer.getvalue().decode().strip().splitlines()
            if ended.code == 2 and said and said[-1].startswith("error: "):
                return "refused"
            return f"exit status {ended.code}: {said[-1:]}"
        except pytest.fail.Exception as hang:
            return str(hang)
        except Exception as error:
            place = error.__traceback__
            while place and place.tb_next:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
            return f"traceback: {type(error).__name__}: {error} ({where})"
    return "done"


@pytest.mark.parametrize("cases", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_command_line_ends_in_a_traceback_or_hangs(cases, work, trained, monkeypatch, record_property):
    draws = random.Random(cases)
    options = {verb: options_of(parser_of(verb)) for verb in VERBS}
    counts, failures = Counter[str](), []
    for case in range(cases):
        verb = draws.choice(sorted(set(VERBS) - {"label"}))  # which serves a page until it is stopped
        words = command(draws, verb, options[verb], work | {"case": str(case)})
        monkeypatch.setattr(sys, "stdin", io.StringIO("colours/red/000.png\n"))
        ended = outcome(words)
        counts[ended if ended in ("done", "refused") else "failed"] += 1
        if ended not in ("done", "refused"):
            failures.append(f"{' '.join(map(repr, words))}\n    {ended}")
            print(failures[-1], flush=True)
        if {path.name for path in Path("colours").iterdir()} != set(COLOURS):  # taken for another folder
            shutil.rmtree("colours")
            shutil.copytree(trained / "colours", "colours")
    record_property("counts", f"command lines tried: {cases}, {dict(counts)}")
    assert not failures, "\n".join(failures)
    assert counts["done"] > cases / 10
