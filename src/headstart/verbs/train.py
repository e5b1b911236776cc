"""The `train` command: trains a head on a folder of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.fit.cli import TrainCLI
from headstart.fit.run import finish, fit, report, test
from headstart.model.weights import DEMO
from headstart.terminal import Seconds, program, quiet_libraries, say

OWN_IMAGES = "--data.root=path/to/your/photos    (one folder of images per class)"


def train(options: Sequence[str], root: Path | None = None) -> dict[str, Any]:
    """Fits a head, tests the best checkpoint, writes the report and the result, and says what to do next.

    ``root`` is the default of `--data.root`; None: the demo. Returns the content of `result.json`; empty if nothing was
    left to train.
    """
    seconds = Seconds()
    quiet_libraries()
    root = root or DEMO
    cli = TrainCLI(options, root)  # parses the options; makes cli.datamodule, cli.model and cli.trainer
    if cli.say_if_finished():
        return {}
    fit(cli, seconds)
    scores = test(cli, seconds)
    report(cli, scores, seconds)
    result = finish(cli, scores, seconds)
    if cli.datamodule.source.path == root:
        say(f"next:     {program('train')} {OWN_IMAGES}")
    return result
