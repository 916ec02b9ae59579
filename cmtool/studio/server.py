"""The studio's server: this machine alone, and nobody without the token.

Three locks: the socket listens on 127.0.0.1, every request must carry the token (which only the address printed at the
start holds), and the Host header must be this machine's, so that no foreign page can reach it under a name of its own.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cmtool.errors import UserError
from cmtool.studio.work import Workshop

LARGEST = 32 * 2**20  # bytes of a request
ASSETS = {"/": ("page.html", "text/html"), "/studio.css": ("studio.css", "text/css"),
          "/studio.js": ("studio.js", "text/javascript")}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class StudioServer(ThreadingHTTPServer):
    """Serves one workshop on 127.0.0.1.

    Args:
        workshop: what answers.
        port: where to listen; 0 takes a free one.
        token: what requests must carry; None draws one.

    Raises:
        UserError: the port is taken or forbidden.
    """

    daemon_threads = True

    def __init__(self, workshop: Workshop, port: int = 0, token: str | None = None) -> None:
        self.workshop = workshop
        self.token = token or secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}.", "leave --port out") from error

    @property
    def url(self) -> str:
        """The address with its token."""
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: StudioServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: addresses hold the token."""

    def do_GET(self) -> None:
        """Answer with the page, its style or its script."""
        path = urlsplit(self.path).path
        if not self._allowed():
            return
        if path not in ASSETS:
            return self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here.")
        name, kind = ASSETS[path]
        text = (files("cmtool.studio") / "assets" / name).read_text(encoding="utf-8")
        self._answer(HTTPStatus.OK, text.replace("{{token}}", self.server.token).encode(), f"{kind}; charset=utf-8")

    def do_POST(self) -> None:
        """Answer what the page asks of the model."""
        body = self._body()
        if body is None or not self._allowed():
            return
        try:
            asked = json.loads(body or b"{}")
            if not isinstance(asked, dict):
                raise ValueError
        except ValueError:
            return self._refuse(HTTPStatus.BAD_REQUEST, "the request is no JSON object.")
        try:
            answer = self.server.workshop.ask(urlsplit(self.path).path.removeprefix("/api/"), asked)
        except UserError as error:
            hint = f" {error.hint}" if error.hint else ""
            return self._refuse(HTTPStatus.BAD_REQUEST, f"{error.message}{hint}")
        except Exception as error:  # a fault of ours must not end the server: the page shows it, the terminal too
            print(f"Error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        self._json(HTTPStatus.OK, answer)

    def _body(self) -> bytes | None:
        """Read the whole request, so that the connection can be used again; None when it was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request is too large.")
            return None
        return self.rfile.read(int(length))

    def _allowed(self) -> bool:
        """Whether the request is from the page that this server gave out; refused otherwise."""
        port = self.server.server_port
        given = self.headers.get("X-Token") or "".join(parse_qs(urlsplit(self.path).query).get("token", [])[:1])
        here = self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")
        if here and hmac.compare_digest(given.encode(), self.server.token.encode()):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "the address holds no valid token; open the one that cmtool studio printed.")
        return False

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        self._json(status, {"error": sentence})

    def _json(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        self._answer(status, json.dumps(document).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
