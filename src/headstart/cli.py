"""The program `headstart`: its commands, and its exit statuses."""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

from headstart.errors import UserError
from headstart.terminal import one_line

# Each command is a function in `verbs/`, in a module of the same name.
VERBS = {
    "train": "train a head on a folder of images, test it, and write a report",
    "tune": "search a grid of settings at once, then train a head with the best ones",
    "finetune": "continue from a trained head and train the last layers of the backbone too",  # wing: finetune
    "evaluate": "score a trained head on its test split, or on another folder",
    "predict": "predict the class of each image file",  # wing: deploy
    "export": "export a trained head as one ONNX file, or as weights for torchvision",  # wing: deploy
    "demo": "try a head on a page in the browser: drop a picture, see what it says and why",  # wing: deploy
    "check": "find duplicates, likely wrong labels, outliers and damaged files in a folder",  # wing: audit
    "domains": "leave out each domain in turn: train on the others, test on the one left out",  # wing: domains
    "fewshot": "learn new classes from a few examples each: meta-train, compare, save",  # wing: fewshot
    "embed": "write the features of images to a file, for other tools",  # wing: label
    "similar": "find the most similar images of a folder to a picture",  # wing: label
    "next": "choose which unlabelled images to label next",  # wing: label
    "label": "label images on a page in the browser",  # wing: label
    "runs": "list runs with their scores and the settings that differ between them",
    "cache": "list, verify or prune the cached features",
}

SEVERAL_PROCESSES = ("train", "tune", "finetune")  # the others are started once

HELP = Path(__file__).parent / "help"  # the short help of each command, made by docs/help.py

WORKER_KILLED = (
    "--data.num_workers: a process that decodes images was killed, for lack of memory or shared memory (/dev/shm); "
    "lower it, or decode in the main process with --data.num_workers=0"
)


def main(args: Sequence[str] | None = None, root: Path | None = None) -> Any:
    """Runs a command; a user's mistake ends in one line and exit status 2.

    Args:
        args: the command and its options; None: those of the process.
        root: default of `--data.root` for `train` and `tune`; None: the demo.

    Returns:
        What the command returns; for `train`, the content of `result.json`.
    """
    _prepare_streams()
    try:
        try:
            return _run(list(sys.argv[1:] if args is None else args) or ["--help"], root)
        finally:
            sys.stdout.flush()  # a full device is reported here
    except (KeyboardInterrupt, SystemExit) as ended:
        _end_as_signalled(ended)
    except UserError as error:
        sys.exit(_say_error(str(error)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "standard output: " if _stdout_is_broken() else ""
        if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, stopped reading
            sys.exit(141)
        sys.exit(_say_error(f"{where}{error.strerror or error}"))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(_say_error(WORKER_KILLED))


def _run(arguments: list[str], root: Path | None) -> Any:
    verb, *options = arguments
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:10}{what}" for name, what in VERBS.items())
        print(f"usage: headstart COMMAND [options]\n\n{verbs}\n\nheadstart COMMAND --help lists its options.")
        return None
    if verb not in VERBS:
        raise UserError(f"headstart {verb}: no such command; headstart --help lists them")
    if options in (["--help"], ["-h"]) and (short := HELP / f"{verb}.txt").is_file():
        print(short.read_text(encoding="utf-8"), end="")
        sys.exit()  # as the parser does
    processes = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"  # torchrun's, srun's
    if verb not in (*SEVERAL_PROCESSES, "runs", "cache") and processes != "1":
        raise UserError(f"headstart {verb}: runs in one process; start it without torchrun, or by srun --ntasks=1")
    # torch takes seconds to import, so a command is imported when it is used.
    run = getattr(import_module(f"headstart.verbs.{verb}"), verb)
    return run(options, root) if verb in ("train", "tune") else run(options)


def _prepare_streams() -> None:
    """Opens streams that the caller closed, and accepts names and paths in any encoding."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the next file opened would get its descriptor
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            with suppress(OSError):  # a pipe that was already read from cannot seek
                stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def _stdout_is_broken() -> bool:
    """Whether its device is full or its reader is gone; if so, drops its buffer, which would make the exit fail too."""
    try:
        print(flush=True)
    except OSError:
        _drop(sys.stdout)
        return True
    return False


def _drop(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say_error(message: str) -> int:
    """Prints a message as one line; returns the exit status of a user's mistake."""
    try:
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # nothing can be printed; the exit status remains
        _drop(sys.stderr)
    return 2


def _end_as_signalled(ended: BaseException) -> NoReturn:
    """Exits with 130 after Ctrl-C and 143 after SIGTERM; Lightning, which ends the fit itself, would give 1 and 0."""
    status = None
    if isinstance(ended, KeyboardInterrupt) or isinstance(ended.__context__, KeyboardInterrupt):
        status = 130
    elif type(ended).__name__ == "SIGTERMException":  # Lightning's, which this module does not import
        status = 143
    elif isinstance(ended.__context__, BrokenPipeError):  # raised while rich was printing
        sys.exit(141)
    if status is None:
        raise ended
    print("interrupted", file=sys.stderr)
    sys.exit(status)


def console() -> None:
    """The installed program; what a command returns is for Python only, not an exit status."""
    main()
