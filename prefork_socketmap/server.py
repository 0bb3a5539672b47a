"""Server: the library's face. Register functions as maps, name endpoints, serve.

What a lookup may return and what becomes of it is in ``service``; how workers live and die is in ``prefork``.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from prefork_socketmap.background import BackgroundMaster
from prefork_socketmap.config import Config
from prefork_socketmap.prefork.counters import SlotCounters
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.prefork.master import Master
from prefork_socketmap.prefork.plan import Observer, Plan
from prefork_socketmap.service import DefaultLookup, Lookup, Service, counter_names

AnyLookup = TypeVar("AnyLookup", bound=Lookup)
AnyDefaultLookup = TypeVar("AnyDefaultLookup", bound=DefaultLookup)


class Server:
    """A socketmap server whose maps are Python functions.

    A map's function gets the key, a str, as Postfix sent it (in lower case from smtpd(8), as the client typed it
    from cleanup(8) and others: fold it where case does not matter). It returns a str or ``Reply.ok(str)``, None or
    ``Reply.not_found()``, or another ``Reply``. It runs in a worker process, one lookup at a time; an exception
    becomes TEMP, a TimeoutError becomes TIMEOUT, and its traceback goes to the log.

    >>> server = Server()
    >>> @server.map("virtual_domains")
    ... def virtual_domains(key):
    ...     return "found" if key == "example.com" else None
    >>> server.listen_and_serve("127.0.0.1:27823")  # doctest: +SKIP
    """

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or Config()
        self._maps: dict[str, Lookup] = {}
        self._default: DefaultLookup | None = None
        self._worker_starts: list[Callable[[], object]] = []
        self._endpoints: list[Endpoint] = []
        self._lock = threading.Lock()
        self._foreground: _Foreground | None = None
        self._background: BackgroundMaster | None = None
        self._closed = False

    def map(self, name: str) -> Callable[[AnyLookup], AnyLookup]:
        """Return a decorator that registers a function as the map *name*."""

        def register(function: AnyLookup) -> AnyLookup:
            self.register_map(name, function)
            return function

        return register

    def register_map(self, name: str, function: Lookup) -> None:
        """Answer lookups in the map *name* with ``function(key)``. Raises ValueError for a bad or a known name."""
        if not name or " " in name:
            raise ValueError(
                f"{name!r} cannot be a map's name: a space ends the name in a request, and it is not empty"
            )
        if name in self._maps:
            raise ValueError(f"the map {name!r} is registered already")
        self._maps[name] = function

    def default_map(self, function: AnyDefaultLookup) -> AnyDefaultLookup:
        """Register a function for all other map names; usable as a decorator."""
        self.register_default_map(function)
        return function

    def register_default_map(self, function: DefaultLookup) -> None:
        """Answer lookups in any other map with ``function(name, key)``. Raises ValueError if there is one already."""
        if self._default:
            raise ValueError("a default map is registered already")
        self._default = function

    def on_worker_start(self, function: Callable[[], object]) -> Callable[[], object]:
        """Run ``function()`` in each worker before it serves, to open database connections there; a decorator too.

        An exception keeps the worker from starting.
        """
        self._worker_starts.append(function)
        return function

    def listen(self, endpoint: str | Endpoint) -> None:
        """Add an endpoint: ``"inet:host:port"``, ``"unix:/path"``, or an ``Endpoint``. Raises SettingError."""
        if isinstance(endpoint, str):
            endpoint = Endpoint.parse(endpoint, self._config.port)
        self._endpoints.append(endpoint)

    def listen_and_serve(self, address: str = "") -> None:
        """Serve on a TCP *address*, ``"host:port"``, until stopped; what is missing is 127.0.0.1, and Config.port."""
        self._endpoints.append(Endpoint.parse_inet(address, self._config.port))
        self.serve_forever()

    def listen_and_serve_unix(self, path: str) -> None:
        """Serve on a Unix socket at *path*, mode 0666, until stopped."""
        self._endpoints.append(Endpoint("unix", path=path))
        self.serve_forever()

    def serve_forever(self) -> None:
        """Be the master process until stopped: by TERM (graceful), INT or QUIT (at once), or the methods below.

        HUP replaces the workers. In another thread than the main one, signals are left alone; a program with several
        threads had better use ``start``, since workers are forked from the process that serves. Raises ListenError,
        an OSError, for an address that is in use or not ours; StartError when the workers cannot start;
        RuntimeError when there is nothing to serve, or when the server is closed or serving already.
        """
        with self._lock:
            self._check_may_serve()
            serving = self._foreground = _Foreground(Master(self._plan()))
        try:
            serving.master.run()
        finally:
            self._foreground = None
            serving.over.set()

    def start(self) -> RunningServer:
        """Serve in the background, from a process of its own; return when it answers. Raises as ``serve_forever``.

        It stops when this process ends. Use it as a context manager to stop it earlier.
        """
        with self._lock:
            self._check_may_serve()
            plan = self._plan()

            def make_master(observer: Observer, lifeline: socket.socket) -> Master:
                return Master(plan, observer=observer, lifeline=lifeline)

            self._background = BackgroundMaster(make_master)
            return RunningServer(self, self._background)

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop gracefully: lookups under way are answered. Wait for the end, *timeout* seconds at most.

        Raises TimeoutError when it takes longer; the server goes on stopping. Without a timeout stop_timeout bounds
        it. Called where the server itself runs, from a signal handler, it returns at once. Does nothing when the
        server does not serve.
        """
        self._stop(signal.SIGTERM, timeout)

    def close(self) -> None:
        """Stop at once: lookups under way are lost. The server cannot serve again."""
        self._closed = True
        self._stop(signal.SIGQUIT, None)

    def _stop(self, number: signal.Signals, timeout: float | None) -> None:
        foreground, background = self._foreground, self._background
        gone = True
        if foreground:
            gone = foreground.stop(number, timeout)
        elif background:
            background.send(number)
            gone = background.wait(timeout)
        if not gone:
            raise TimeoutError(f"the server has not stopped within {timeout} s; it goes on stopping")

    def _check_may_serve(self) -> None:
        if self._closed:
            raise RuntimeError("the server is closed")
        if self._foreground or (self._background and not self._background.wait(0)):
            raise RuntimeError("the server is serving already")
        if not self._maps and not self._default:
            raise RuntimeError("no map is registered: there is nothing to serve")
        if not self._endpoints:
            raise RuntimeError("no endpoint is named: call listen() first")

    def _plan(self) -> Plan:
        names = counter_names(self._maps, has_default=self._default is not None)
        return Plan(tuple(self._endpoints), self._config, self._start_worker, names)

    def _start_worker(self, counters: SlotCounters) -> Service:
        for function in self._worker_starts:
            function()
        return Service(self._maps, self._default, self._config, counters)


class _Foreground:
    """A master that runs in a thread of this process."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.over = threading.Event()
        self._thread = threading.get_ident()

    def stop(self, number: signal.Signals, timeout: float | None) -> bool:
        """Stop the master; return whether it has ended, or will without our waiting."""
        if number == signal.SIGTERM:
            self.master.stop()
        else:
            self.master.kill()
        # A signal handler interrupts the very loop that would have to end: to wait for it would be for ever.
        return threading.get_ident() == self._thread or self.over.wait(timeout)


class RunningServer:
    """A server that was started in the background; leaving its ``with`` block stops it gracefully."""

    def __init__(self, server: Server, background: BackgroundMaster) -> None:
        self._server = server
        self._background = background

    @property
    def endpoints(self) -> list[str]:
        """Where it listens, as ``"inet:host:port"`` and ``"unix:/path"``, with the ports that the kernel chose."""
        return [str(endpoint) for endpoint in self._background.endpoints]

    @property
    def pid(self) -> int:
        """The process id of the master; 0 when it has been stopped."""
        return self._background.pid

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
