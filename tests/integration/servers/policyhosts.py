"""Private policy hosts of MTA-STS: HTTPS on port 443 of one address, with certificates of an authority of its own.

In a ``private_network``. What a host answers, and with which certificate, a test says by its name.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.integration.servers.process import program

ADDRESS = "127.0.0.3"
POLICY = "version: STSv1\nmode: enforce\nmx: *.mx.{domain}\nmax_age: 604800\n"


class Authority:
    """A certificate authority."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._openssl = program("openssl", "openssl")
        self._serial = 0
        self.file = directory / "ca.pem"
        self._key = directory / "ca.key"
        request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=authority"
        self._run(*request.split(), "-keyout", str(self._key), "-out", str(self.file))

    def certify(self, *names: str, days: int = 2, common_name: str = "leaf") -> Path:
        """Return a file with a new key and a certificate for *names*, which ends in so many days."""
        self._serial += 1
        file = self._directory / f"{self._serial}.pem"
        key, request, extensions = (file.with_suffix(end) for end in (".key", ".csr", ".ext"))
        new = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        self._run(*new, "-subj", f"/CN={common_name}", "-keyout", str(key), "-out", str(request))
        alternatives = ",".join(f"DNS:{name}" for name in names)
        extensions.write_text(f"subjectAltName={alternatives}\n" if names else "basicConstraints=CA:FALSE\n")
        sign = ["x509", "-req", "-in", str(request), "-CA", str(self.file), "-CAkey", str(self._key)]
        serial = ["-set_serial", str(self._serial), "-days", str(days), "-extfile", str(extensions)]
        self._run(*sign, *serial, "-out", str(file))
        file.write_text(file.read_text() + key.read_text())
        return file

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._openssl, *arguments], check=True, capture_output=True)


@dataclass
class Site:
    """What a host answers. Without a *certificate* it is one for the host's name."""

    body: bytes = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = (("Content-Type", "text/plain"),)
    certificate: Path | None = None
    speak: Callable[[BaseHTTPRequestHandler], None] | None = None
    """What writes the answer, in place of all that."""


class PolicyHosts:
    """The server. ``sites`` are by host name; ``requests`` what it has been asked, in order."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="socketmap-")
        path = Path(self._directory.name)
        path.chmod(0o755)
        self.authority = Authority(path)
        (path / "stranger").mkdir()
        self.stranger = Authority(path / "stranger")
        """An authority that nobody believes."""
        self.sites: dict[str, Site] = {}
        self.requests: list[str] = []
        self._contexts: dict[Path, ssl.SSLContext] = {}
        self._default = self.authority.certify("nobody.test")
        hosts = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hosts.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Httpd(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def finish_request(self, request: socket.socket | tuple[bytes, socket.socket], address: object) -> None:
                assert isinstance(request, socket.socket)
                with contextlib.suppress(OSError), hosts.context().wrap_socket(request, server_side=True) as tls:
                    super().finish_request(tls, address)

            def handle_error(self, *_: object) -> None:
                pass

        self._httpd = Httpd((ADDRESS, 443), Handler)

    def context(self) -> ssl.SSLContext:
        """Return the context of a new connection, which the name that the client sends exchanges for another."""
        context = self._context(self._default)
        context.sni_callback = self._choose
        return context

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request as the site of its host does."""
        host = handler.headers["Host"]
        self.requests.append(f"{host} {handler.path}")
        site = self.sites[host]
        if site.speak:
            site.speak(handler)
            return
        handler.send_response(site.status)
        for name, value in site.headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(site.body)))
        handler.end_headers()
        handler.wfile.write(site.body)

    def add(self, domain: str, text: str | bytes = POLICY, **site: object) -> Site:
        """Have the policy host of *domain* answer with *text*, in which the domain is filled in."""
        host = f"mta-sts.{domain}"
        body = text.replace("{domain}", domain).encode() if isinstance(text, str) else text
        self.sites[host] = new = Site(body, **site)  # type: ignore[arg-type]
        return new

    def certify_all(self) -> None:
        """Make one certificate for the hosts that have none of their own."""
        names = [host for host, site in self.sites.items() if site.certificate is None]
        certificate = self.authority.certify(*names)
        for host in names:
            self.sites[host].certificate = certificate

    def _choose(self, sock: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        site = self.sites.get(name or "")
        if site and site.certificate:
            sock.context = self._context(site.certificate)

    def _context(self, certificate: Path) -> ssl.SSLContext:
        if certificate not in self._contexts:
            self._contexts[certificate] = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
        return self._contexts[certificate]

    def __enter__(self) -> PolicyHosts:
        threading.Thread(target=self._httpd.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._directory.cleanup()


@contextlib.contextmanager
def silent(address: str) -> Iterator[list[bytes]]:
    """Be a DNS resolver that never answers; yield the questions as they come."""
    heard: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            heard.append(self.request[0])

    class Udp(socketserver.UDPServer):
        allow_reuse_address = True

    with Udp((address, 53), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield heard
        server.shutdown()
        thread.join()
