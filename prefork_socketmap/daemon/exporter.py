"""The metrics process: what the scoreboard says, over HTTP, for Prometheus. ``python -m`` runs it for the master.

It can read the scoreboard and has nothing else of the server: no map, no password, no right. What clients can do to
it is bounded: so many at a time, for so long, and one look at the scoreboard in a second for all of them.
"""

from __future__ import annotations

import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from setproctitle import setproctitle

from prefork_socketmap.daemon import backends, privileges, prometheus, report
from prefork_socketmap.daemon import log as log_lines
from prefork_socketmap.daemon.metrics import BACKENDS, BOARD, LIFELINE, Spec
from prefork_socketmap.daemon.privileges import Account
from prefork_socketmap.daemon.prometheus import Family
from prefork_socketmap.daemon.report import Finding
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.scoreboard import Scoreboard
from prefork_socketmap.settings import SettingError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger("prefork_socketmap.metrics")

MOST_CLIENTS = 8
DEADLINE = 10.0
"""How long a client may take for its request and to read the answer, in seconds."""
_FRESH = 1.0  # seconds
_DESCRIPTORS = 64
_MEMORY = 256 << 20
_NICENESS = 10
_ROOT = 0


def library() -> Any:
    """Return prometheus_client. Raises SettingError when it is not installed."""
    try:
        import prometheus_client
    except ImportError as error:
        problem = f"needs a Python package that is not there ({error}); install prefork-socketmap[metrics]"
        raise SettingError("metrics.listen", problem) from error
    return prometheus_client


def main(arguments: Sequence[str]) -> int:
    """Serve metrics as the only argument says; return when that is not possible."""
    spec = Spec.decode(arguments[0])
    setproctitle("prefork-socketmap: metrics")
    threading.Thread(target=_end_with_master, daemon=True).start()
    log_lines.set_up("metrics", spec.log)
    try:
        client = library()
        registry = client.CollectorRegistry(auto_describe=False)
        registry.register(Collector(BOARD, BACKENDS))
        server = Server(Endpoint.parse_inet(spec.listen), client.make_wsgi_app(registry))
        _give_up_rights(spec)
    except SettingError as error:
        log.error("%s", error)
        return os.EX_CONFIG
    except OSError as error:
        log.error("metrics.listen: cannot serve metrics at %s: %s", spec.listen, error.strerror or error)
        return os.EX_UNAVAILABLE
    log.info("serving metrics at http://%s/metrics", spec.listen)
    server.serve_forever()
    return os.EX_OK


def _end_with_master() -> None:
    os.read(LIFELINE, 1)
    os._exit(os.EX_OK)


def _give_up_rights(spec: Spec) -> None:
    """Keep what is needed to read and answer, and no more. Now: all code is loaded, and the socket bound."""
    if os.geteuid() == _ROOT:
        Account.find(spec.user, spec.group).assume()
    with suppress(OSError):  # a service manager may have forbidden the very question, having dropped them itself
        privileges.drop_capabilities()
    privileges.forbid_more()
    privileges.hide()
    with suppress(OSError):
        os.nice(_NICENESS)
    for limit, most in ((resource.RLIMIT_NOFILE, _DESCRIPTORS), (resource.RLIMIT_DATA, _MEMORY)):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))


class Collector:
    """Gives the client library what the scoreboard says, and the board of the backends."""

    def __init__(self, board: int, backends: int) -> None:
        self._board = board
        self._backends = backends
        self._lock = threading.Lock()
        self._families: list[Family] = []
        self._until = 0.0

    def collect(self) -> Iterator[Metric]:
        """Iterate over the metrics."""
        from prometheus_client.core import Metric

        for family in self._look():
            # It adds the end of a counter's name itself.
            name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            metric = Metric(name, family.what, family.kind)
            for suffix, labels, value in family.samples:
                metric.add_sample(family.name + suffix, dict(labels), value)
            yield metric

    def _look(self) -> list[Family]:
        with self._lock:
            if time.monotonic() >= self._until:
                found = report.make(Scoreboard.open(self._board), backends.read_open(self._backends))
                self._families = list(prometheus.families(Finding(os.EX_OK, "", report=found)))
                self._until = time.monotonic() + _FRESH
            return self._families


class Server(ThreadingMixIn, WSGIServer):
    """Serves *app* to MOST_CLIENTS at a time; one more is hung up on."""

    daemon_threads = True

    def __init__(self, endpoint: Endpoint, app: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        self._room = threading.BoundedSemaphore(MOST_CLIENTS)
        super().__init__((endpoint.host, endpoint.port), Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind; unlike the parent's, with no question to a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client in a thread of its own, if there is room."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a client, for DEADLINE at most."""
        hurry = threading.Timer(DEADLINE, _hang_up, [request])
        hurry.daemon = True
        hurry.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            hurry.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Say nothing of a client that has hung up; anything else is ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request for metrics failed")


def _hang_up(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class Handler(WSGIRequestHandler):
    """Logs nothing of what clients ask."""

    timeout = DEADLINE

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
