"""A small HTTP and HTTPS server, stdlib alone: ``http_program.py PORT TLS_PORT CERTIFICATE KEY``.

What it answers is told by the path, so that it needs no state. A program of its own, so that it can be stopped and
frozen as the other servers can.
"""

from __future__ import annotations

import posixpath
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    """Answers by the path.

    - ``/``: "root".
    - ``/status/CODE``: that status, with the body "failed".
    - ``/header/NAME``: what the client sent in that header.
    - ``/body?text=TEXT``: TEXT; with ``&type=TYPE`` as that content type, with ``&status=CODE`` with that status.
    - ``/json?text=TEXT``: TEXT, as JSON.
    - ``/untyped``: "text", without a content type.
    - ``/later/CODE?after=TIME``: that status, with a header Retry-After.
    - ``/absent/HEADER``: 404 with the header ``Socketmap-Status: HEADER``.
    - ``/echo/KEY``: KEY; but the connection is closed without an answer when KEY begins with "bad", and in the
      middle of one when it begins with "half".
    - ``/once?...``: the same, and the connection is closed without a word about it.
    - ``/untold/KEY``: KEY, its end being told by that of the connection alone; over TLS in an orderly way, but when
      KEY begins with "cut".
    - ``/large``: two million bytes.
    - ``/alias/KEY``: the address that is known for KEY, or 404 and "NOTFOUND".
    - anything else: 404.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    aliases = {  # noqa: RUF012
        "info@example.com": "staff@example.net",
        "@example.com": "rest@example.net",
        "two words": "2",
        "a/b": "slash",
    }

    def do_GET(self) -> None:  # noqa: C901 - a list
        """Answer."""
        # As most servers do: decode first, and then follow "..".
        path = posixpath.normpath(unquote(urlsplit(self.path).path))
        query = parse_qs(urlsplit(self.path).query)
        kind, _, rest = path.lstrip("/").partition("/")
        if not kind:
            self._answer(200, "root")
        elif kind == "status":
            self._answer(int(rest), "failed")
        elif kind == "header":
            self._answer(200, self.headers.get(rest, ""))
        elif kind in ("body", "once"):
            content_type = query.get("type", ["text/plain; charset=utf-8"])[0]
            self._answer(int(query.get("status", ["200"])[0]), query.get("text", [""])[0], content_type)
            self.close_connection = kind == "once"
        elif kind == "json":
            self._answer(200, query.get("text", [""])[0], "application/json")
        elif kind == "untyped":
            self._answer(200, "text", None)
        elif kind == "later":
            self._answer(int(rest), "wait", retry_after=query.get("after", [""])[0])
        elif kind == "absent":
            self._answer(404, "", socketmap_status=rest)
        elif kind == "echo":
            self.close_connection = rest.startswith(("bad", "half"))
            if rest.startswith("half"):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n\r\nhalf")
            elif not self.close_connection:
                self._answer(200, rest)
        elif kind == "untold":
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + rest.encode())
            if isinstance(self.connection, ssl.SSLSocket) and not rest.startswith("cut"):
                self.connection.unwrap()
        elif kind == "large":
            self._answer(200, "x" * 2_000_000)
        elif kind == "alias":
            known = rest in self.aliases
            self._answer(200 if known else 404, self.aliases[rest] + "\n" if known else "NOTFOUND\n")
        else:
            self._answer(404, self.path)

    def _answer(
        self, status: int, text: str, content_type: str | None = "text/plain; charset=utf-8", **headers: str
    ) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Location", "/alias/info@example.com")
        self.send_header("Content-Length", str(len(body)))
        if content_type is not None:
            self.send_header("Content-Type", content_type)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def _main(port: str, tls_port: str, certificate: str, key: str) -> None:
    secure = ThreadingHTTPServer(("127.0.0.1", int(tls_port)), Handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    threading.Thread(target=secure.serve_forever, daemon=True).start()
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    _main(*sys.argv[1:])
