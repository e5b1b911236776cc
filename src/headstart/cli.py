"""The command `headstart`: which verb does what, and how it ends."""

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

# Each verb is a function of its name in a module of its name in `verbs/`.
VERBS = {
    "train": "train a head on a folder of images, test it, and say where the run is",
    "tune": "train a grid of heads at once, then one with the winner's settings",
    "finetune": "continue from a trained head, with the backbone's last layers learning too",  # wing: finetune
    "evaluate": "score a trained head on its test split, or on another folder",
    "predict": "the class of each of your files",  # wing: deploy
    "export": "a trained head as one ONNX file, or as weights for torchvision",  # wing: deploy
    "check": "duplicates, likely wrong labels, outliers and damaged files of a folder",  # wing: audit
    "fewshot": "learn new classes from a few examples each; meta-train, compare, save",  # wing: fewshot
    "runs": "list the runs with their scores and the settings in which they differ",
    "cache": "list, verify or prune the features that are kept between runs",
}

WORKER_KILLED = (
    "--data.num_workers: a process that decodes images was killed, for lack of memory or of shared memory (/dev/shm); "
    "lower it, or decode in the main process with --data.num_workers=0"
)


def main(args: Sequence[str] | None = None, root: Path | None = None) -> Any:
    """Runs a verb; a user's mistake ends in one line and exit status 2.

    Args:
        args: the verb and its options; None: the process's own.
        root: the data that `train` takes when none is given.

    Returns:
        What the verb gives; of `train`, the content of its `result.json`.
    """
    _prepare_streams()
    try:
        try:
            return _run(list(sys.argv[1:] if args is None else args) or ["--help"], root)
        finally:
            sys.stdout.flush()  # a device that is full says so now
    except (KeyboardInterrupt, SystemExit) as ended:
        _end_as_signalled(ended)
    except UserError as error:
        sys.exit(_say_error(str(error)))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "standard output: " if _stdout_is_broken() else ""
        if isinstance(error, BrokenPipeError):  # who read our output, such as `head`, has enough
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
        print(f"usage: headstart VERB [options]\n\n{verbs}\n\nheadstart VERB --help lists the options of a verb.")
        return None
    if verb not in VERBS:
        raise UserError(f"headstart {verb}: no such verb; headstart --help lists them")
    # torch takes seconds to import, so a verb is imported when it is used.
    run = getattr(import_module(f"headstart.verbs.{verb}"), verb)
    return run(options, root) if verb in ("train", "tune") else run(options)


def _prepare_streams() -> None:
    """Opens what the caller closed, and takes names and paths in any encoding."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            with suppress(OSError):  # a pipe that was read from already cannot be sought
                stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


def _stdout_is_broken() -> bool:
    """Whether its device is full or its reader is gone; then what it holds is dropped, or the exit would fail too."""
    try:
        print(flush=True)
    except OSError:
        _drop(sys.stdout)
        return True
    return False


def _drop(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say_error(message: str) -> int:
    """Prints it as one line; gives the exit status of a user's mistake."""
    try:
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # where nothing can be said, the status tells
        _drop(sys.stderr)
    return 2


def _end_as_signalled(ended: BaseException) -> NoReturn:
    """Ends with 130 at Ctrl-C and 143 at SIGTERM; Lightning, which ends a fit in good order, would give 1 and 0."""
    status = None
    if isinstance(ended, KeyboardInterrupt) or isinstance(ended.__context__, KeyboardInterrupt):
        status = 130
    elif type(ended).__name__ == "SIGTERMException":  # Lightning's, which this module does not import
        status = 143
    elif isinstance(ended.__context__, BrokenPipeError):  # rich met it
        sys.exit(141)
    if status is None:
        raise ended
    print("interrupted", file=sys.stderr)
    sys.exit(status)


def console() -> None:
    """The installed command; what a verb returns is for Python alone, not an exit status."""
    main()
