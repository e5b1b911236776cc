"""The `label` command: a page on this machine to label images on, with the keys 1 to 9."""

import os
import secrets
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from headstart.errors import UserError
from headstart.files import read_csv
from headstart.label.answers import Answers
from headstart.label.heap import folder_of_images
from headstart.parser import parser_of, required
from headstart.ranges import Port
from headstart.terminal import say


def label(options: Sequence[str]) -> dict[str, int]:
    """Opens the page, and serves it until Ctrl-C; an answer is on disk before the next picture is shown.

    Returns the number of images of the queue that are `labelled`, and of those `left`.
    """
    parser = parser_of("label")
    parser.add_argument("--data.root", type=str | None, help="folder of images, with or without subfolders")
    parser.add_argument(
        "--queue", type=str | None, help="CSV file of paths, such as that of `headstart next`; None: all images"
    )
    parser.add_argument("--labels", type=str, default="labels.csv", help="CSV file to write; continued if it exists")
    parser.add_argument(
        "--classes", type=str | None, help="class names, such as ant,bee; others can be typed on the page"
    )
    parser.add_argument("--port", type=Port, default=0, help="port on localhost; 0: a free one")
    parser.add_argument("--browser", type=bool, default=True, help="open the page in a browser")
    given = parser.parse_args(list(options))
    required(given, "--data.root")
    try:
        from headstart.label.page import LabelPage, within
        from headstart.serving import serve
    except ImportError as error:
        raise UserError("label: needs werkzeug: pip install -e '.[label]'") from error

    source, answers = folder_of_images(given.data.root), Answers(Path(given.labels))
    paths = _queued(given.queue) if given.queue else [source.root / item.path for item in source.listed()]
    queue = [path for path in paths if within(path, source.root)]
    if len(queue) < len(paths):
        say(f"data: {len(paths) - len(queue)} of {len(paths)} images are not in {source.root} and are left out")
    if not queue:
        raise UserError(f"--queue={given.queue}: none of its images is in {source.root}")
    token, classes = secrets.token_urlsafe(16), [name.strip() for name in (given.classes or "").split(",")]
    page = LabelPage(queue, source.root, answers, [name for name in classes if name], token)

    def started(address: str) -> None:
        say(f"page:     {address}/{token}/    (Ctrl-C ends)")
        if given.browser:
            webbrowser.open(f"{address}/{token}/")

    serve(page, "127.0.0.1", given.port, started)  # Ctrl-C ends it
    left = sum(path not in answers.labels for path in queue)
    say(f"labels:   {answers.file}, {len(queue) - left} of {len(queue)} images labelled")
    say(f"train:    headstart train --data.csv={answers.file}")
    return {"labelled": len(queue) - left, "left": left}


def _queued(file: str) -> list[Path]:
    """The absolute paths in a CSV file; they are relative to it."""
    path = Path(file).expanduser().resolve()
    rows = read_csv("--queue", path, ["path"], "surrogateescape")
    return [Path(os.path.normpath(path.parent / row["path"])) for row in rows]
