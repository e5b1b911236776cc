"""The labelling page: one picture at a time, only on this machine."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from werkzeug.exceptions import BadRequest, NotFound
from werkzeug.routing import Rule
from werkzeug.utils import redirect
from werkzeug.wrappers import Request, Response

from headstart.decoding import UnreadableImage, decode
from headstart.files import read_regular
from headstart.images import Preprocessing
from headstart.label.answers import Answers
from headstart.serving import Application, page
from headstart.terminal import one_line

SIDE = 1024  # pixels of the longer side of a picture on the page
LONGEST = 100  # characters of a class name, as in the template


class LabelPage(Application):
    """Shows the images of ``queue`` that have no label yet, and keeps the answers.

    Addresses begin with ``token``; pictures are requested by their number in the queue, re-encoded, and from ``root``.
    """

    def __init__(self, queue: Sequence[Path], root: Path, answers: Answers, classes: Sequence[str], token: str) -> None:
        self._queue, self._root, self._answers, self._home = queue, root, answers, f"/{token}/"
        self._classes, self._skipped = classes, set[Path]()
        picture = Rule(f"{self._home}picture/<int:number>", endpoint=self._picture, methods=["GET"])
        routes = [("GET", self._page), ("POST", self._change)]
        super().__init__([picture, *(Rule(self._home, endpoint=found, methods=[way]) for way, found in routes)])

    def _page(self, request: Request) -> Response:
        left = [number for number, path in enumerate(self._queue) if path not in self._answers.labels]
        shown = [number for number in left if self._queue[number] not in self._skipped]
        return page(
            "label/page.html.jinja",
            shown=shown[:2],  # the second is loaded ahead
            names=[one_line(str(self._queue[number].relative_to(self._root))) for number in shown[:1]],
            classes=list(dict.fromkeys([*self._classes, *self._answers.labels.values()])),
            total=len(self._queue),
            labelled=len(self._queue) - len(left),
            skipped=len(left) - len(shown),
            file=one_line(str(self._answers.file)),
        )

    def _picture(self, request: Request, number: int) -> Response:
        if number >= len(self._queue) or not within(self._queue[number], self._root):
            raise NotFound
        try:
            image = decode(read_regular(self._queue[number]), Preprocessing(resize_size=SIDE))
        except (UnreadableImage, OSError) as error:
            raise NotFound(f"cannot be read: {error}") from error
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return Response(file.getvalue(), mimetype="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    def _change(self, request: Request) -> Any:
        number, label = request.form.get("number", -1, type=int), request.form.get("label", "").strip()
        if not 0 <= number < len(self._queue):
            raise BadRequest("No such picture")
        path = self._queue[number]
        if "undo" in request.form:
            self._skipped.discard(self._answers.undo() or path)
        elif "skip" in request.form:
            self._skipped.add(path)
        elif not label or len(label) > LONGEST or not label.isprintable():
            raise BadRequest(f"A class name has 1 to {LONGEST} printable characters")
        elif path not in self._answers.labels:  # else a page from before, or a second click
            self._answers.add(path, label)
        return redirect(self._home, 303)


def within(path: Path, root: Path) -> bool:
    """Whether a file lies below a folder without links, after all links."""
    return Path(os.path.realpath(path)).is_relative_to(root)
