"""Serves a page on this machine: under a secret address, one request at a time, with nothing from other sites."""

import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import Any

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from headstart.errors import UserError
from headstart.templates import rendered

LOCAL = ("localhost", "127.0.0.1")
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}  # the token is in the address
POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


class Application:
    """A WSGI application; ``rules`` lead to functions of the request.

    Requests are answered one at a time, and only under the names ``hosts``, since another site's name could be made
    to lead here; None: any. ``refused`` is the status of a ``UserError``, and ``largest`` the most bytes of a body.
    """

    refused = 409
    largest = 10_000

    def __init__(self, rules: Iterable[Rule], hosts: Sequence[str] | None = LOCAL) -> None:
        self._map, self._hosts, self._lock = Map(list(rules)), hosts, Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Answers a request."""
        request = Request(environ)
        request.trusted_hosts = None if self._hosts is None else list(self._hosts)
        request.max_content_length = self.largest
        response: Any
        try:
            assert request.host  # raises unless it is a trusted one
            endpoint, values = self._map.bind_to_environ(environ).match()
            with self._lock:
                response = endpoint(request, **values)
        except HTTPException as error:
            response = error.get_response(environ)
            if response.status_code >= 400:  # one line of text instead of a page
                response.data, response.mimetype = f"{error.description}\n", "text/plain"
        except (UserError, OSError) as error:
            response = Response(f"{error}", self.refused)
        response.headers.extend(HEADERS)
        return response(environ, start_response)


def page(template: str, **values: Any) -> Response:
    """An HTML page from a template; no other site can be asked for anything."""
    nonce = secrets.token_urlsafe(16)
    text = rendered(template, nonce=nonce, **values)
    headers = {"Content-Security-Policy": POLICY.format(nonce=nonce), "Cache-Control": "no-store"}
    return Response(text, mimetype="text/html", headers=headers)


class _Silent(WSGIRequestHandler):
    timeout = 30  # seconds to send a request, since one that stalls would hold up the others

    def log(self, *message: object) -> None:
        """Prints nothing, since addresses hold the token."""


def serve(application: Application, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serves until Ctrl-C; calls ``started`` with the address, such as http://127.0.0.1:8000."""
    try:
        listener = socket.create_server((host, port))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--port={port}: cannot be used on {host} ({why}); 0 finds a free one") from error
    with listener:
        server = make_server(host, 0, application, True, request_handler=_Silent, fd=listener.fileno())
    started(f"http://{host}:{server.port}")
    server.serve_forever()
