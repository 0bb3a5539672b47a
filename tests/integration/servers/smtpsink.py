"""SMTP servers that speak TLS, each with a certificate of its own, and keep the mail that they get.

In a ``private_network``: on port 25 of an address of their own.
"""

from __future__ import annotations

import contextlib
import socketserver
import ssl
import threading
from pathlib import Path
from typing import cast


class Sink:
    """An SMTP server at *address*; without a *certificate* it does not speak TLS. ``mails`` are what it has taken."""

    def __init__(self, address: str, name: str, certificate: Path | None) -> None:
        self.name = name
        self.mails: list[tuple[str, bool]] = []
        """The recipient of each, and whether it came over TLS."""
        self.context: ssl.SSLContext | None = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
        self._server = _Server((address, 25), _Session)
        self._server.sink = self

    def __enter__(self) -> Sink:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    sink: Sink

    def handle_error(self, *_: object) -> None:
        """A client that does not like the certificate."""


class _Session(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self._sink = cast("_Server", self.server).sink
        self._is_tls = False
        self._lines = self.request.makefile("rb")
        self._say(f"220 {self._sink.name} ESMTP")
        recipient = ""
        while line := self._lines.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            match verb.upper():
                case "EHLO":
                    offers = ["250-STARTTLS"] if self._sink.context and not self._is_tls else []
                    self._say("\r\n".join([f"250-{self._sink.name}", *offers, "250 8BITMIME"]))
                case "STARTTLS":
                    self._start_tls()
                case "RCPT":
                    recipient = rest.partition("<")[2].partition(">")[0]
                    self._say("250 ok")
                case "DATA":
                    self._say("354 go on")
                    while self._lines.readline().rstrip(b"\r\n") != b".":
                        pass
                    self._sink.mails.append((recipient, self._is_tls))
                    self._say("250 taken")
                case "QUIT":
                    self._say("221 bye")
                    return
                case _:
                    self._say("250 ok")

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self.request.close()

    def _say(self, text: str) -> None:
        self.request.sendall(f"{text}\r\n".encode())

    def _start_tls(self) -> None:
        assert self._sink.context
        self._say("220 go on")
        self.request = self._sink.context.wrap_socket(self.request, server_side=True)
        self._lines = self.request.makefile("rb")
        self._is_tls = True
