"""The labelling page: one picture at a time, on this machine alone."""

import io
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, PackageLoader
from werkzeug.exceptions import BadRequest, Conflict, Forbidden, HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.utils import redirect
from werkzeug.wrappers import Request, Response

from headstart.decoding import UnreadableImage, decode
from headstart.errors import UserError
from headstart.files import read_regular
from headstart.images import Preprocessing
from headstart.label.answers import Answers
from headstart.terminal import one_line

SIDE = 1024  # pixels of the longer side of a picture on the page
LONGEST = 100  # characters of a class name
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}  # the token is in the address
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


class LocalRequest(Request):
    """A request under one of this machine's own names: another site's name could be made to lead here."""

    trusted_hosts = ["localhost", "127.0.0.1"]  # noqa: RUF012  # as werkzeug declares it
    max_content_length = 10_000


class LabelPage:
    """A WSGI application that shows the images of ``queue`` that have no label yet, and keeps the answers.

    An answer is on the disk before the next picture is shown. Addresses begin with ``token``; pictures are given by
    their number in the queue, decoded and encoded anew, and only if they lie within ``root``.
    """

    def __init__(self, queue: Sequence[Path], root: Path, answers: Answers, classes: Sequence[str], token: str) -> None:
        self._queue, self._root, self._answers, self._token = queue, root, answers, token
        self._classes, self._skipped, self._lock = classes, set[int](), Lock()
        environment = Environment(loader=PackageLoader("headstart", "label"), autoescape=True)
        self._template = environment.get_template("page.html.jinja")
        shown = {"": self._page, "picture/<int:number>": self._picture}
        changes = {"answer": self._answer, "skip": self._skip, "undo": self._undo}
        rules = [Rule(f"/<token>/{path}", endpoint=found, methods=["GET"]) for path, found in shown.items()]
        rules += [Rule(f"/<token>/{path}", endpoint=found, methods=["POST"]) for path, found in changes.items()]
        self._map = Map(rules)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answers a request."""
        try:
            response: Any = self._respond(LocalRequest(environ))
        except HTTPException as error:
            response = error.get_response(environ)
        response.headers.extend(HEADERS)
        found: Iterable[bytes] = response(environ, start_response)
        return found

    def _respond(self, request: Request) -> Any:
        assert request.host  # raises unless it is a trusted one
        endpoint, found = self._map.bind_to_environ(request.environ).match()
        values = dict(found)
        if not secrets.compare_digest(values.pop("token").encode(), self._token.encode()):
            raise NotFound
        with self._lock:
            return endpoint(request, **values)

    def _page(self, request: Request) -> Response:
        left = [number for number, path in enumerate(self._queue) if path not in self._answers.labels]
        shown = [number for number in left if number not in self._skipped]
        nonce = secrets.token_urlsafe(16)
        text = self._template.render(
            shown=shown[:2],  # the second is loaded ahead
            names=[one_line(str(self._queue[number].relative_to(self._root))) for number in shown[:1]],
            classes=list(dict.fromkeys([*self._classes, *self._answers.labels.values()])),
            total=len(self._queue),
            labelled=len(self._queue) - len(left),
            skipped=len(left) - len(shown),
            file=one_line(str(self._answers.file)),
            longest=LONGEST,
            nonce=nonce,
        )
        headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Cache-Control": "no-store"}
        return Response(text, mimetype="text/html", headers=headers)

    def _picture(self, request: Request, number: int) -> Response:
        if number >= len(self._queue):
            raise NotFound
        if not within(self._queue[number], self._root):
            raise Forbidden
        try:
            image = decode(read_regular(self._queue[number]), Preprocessing(resize_size=SIDE))
        except (UnreadableImage, OSError) as error:
            raise NotFound(f"cannot be read: {error}") from error
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return Response(file.getvalue(), mimetype="image/jpeg", headers={"Cache-Control": "private, max-age=600"})

    def _answer(self, request: Request) -> Any:
        label, path = request.form.get("label", "").strip(), self._queue[self._number(request)]
        if not label or len(label) > LONGEST or not label.isprintable():
            raise BadRequest(f"A class name has 1 to {LONGEST} printable characters")
        if path not in self._answers.labels:  # else a page from before, or a second click
            self._change(lambda: self._answers.add(path, label))
        return self._next()

    def _skip(self, request: Request) -> Any:
        self._skipped.add(self._number(request))
        return self._next()

    def _undo(self, request: Request) -> Any:
        path = self._change(self._answers.undo)
        self._skipped -= {number for number, other in enumerate(self._queue) if other == path}
        return self._next()

    def _change(self, change: Callable[[], Any]) -> Any:
        try:
            return change()
        except (UserError, OSError) as error:
            raise Conflict(f"Not saved: {error}") from error

    def _number(self, request: Request) -> int:
        number = request.form.get("number", -1, type=int)
        if not 0 <= number < len(self._queue):
            raise BadRequest("No such picture")
        return number

    def _next(self) -> Any:
        return redirect(f"/{self._token}/", 303)


def within(path: Path, root: Path) -> bool:
    """Whether a file lies below a folder without links, after all links."""
    try:
        return path.resolve(strict=True).is_relative_to(root)
    except OSError:
        return False
