"""Server: the library's face. Register functions as maps, name endpoints, serve.

What a lookup may return and what becomes of it is in ``service``; how workers live and die is in ``prefork``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from prefork_socketmap import usage
from prefork_socketmap.config import Config
from prefork_socketmap.registered import Function, Registered
from prefork_socketmap.socketmap.messages import to_bytes

if TYPE_CHECKING:
    from prefork_socketmap.background import BackgroundMaster, MakeMaster
    from prefork_socketmap.foreground import Foreground
    from prefork_socketmap.prefork.listener import Endpoint
    from prefork_socketmap.service import Answer, DefaultLookup, Lookup

    AsyncLookup = Callable[[str], Awaitable[Answer]]
    AsyncDefaultLookup = Callable[[str, str], Awaitable[Answer]]

AnyLookup = TypeVar("AnyLookup", bound="Lookup | AsyncLookup")
AnyDefaultLookup = TypeVar("AnyDefaultLookup", bound="DefaultLookup | AsyncDefaultLookup")
AnyFunction = TypeVar("AnyFunction", bound=Callable[[], object])

_LONGEST_WAIT = 2e6  # seconds: the kernel counts milliseconds in 32 bits; nothing takes as long to stop
_ENDPOINT = 'an Endpoint, "inet:host:port" or "unix:/path", or a socket'


class Server:
    """A socketmap server whose maps are Python functions.

    A map's function gets the key, a str, as Postfix sent it (in lower case from smtpd(8), as the client typed it
    from cleanup(8) and others: fold it where case does not matter). It returns a str or ``Reply.ok(str)``, None or
    ``Reply.not_found()``, or another ``Reply``. It runs in a worker process, one lookup at a time; an exception
    becomes TEMP, a TimeoutError becomes TIMEOUT, and its traceback goes to the log. It may be a coroutine function:
    then it runs in the event loop that its worker has.

    What is registered while the server serves, in another thread, takes effect as after a HUP: new workers have to
    prove themselves before the old ones leave, and no connection is closed. It raises ``StartError`` when they cannot
    start, and then nothing has changed; and RuntimeError in a worker, in a signal handler of the thread that serves
    or that waits for another change, and after ``start``: another process serves then, which no function can be given
    to.

    >>> server = Server()
    >>> @server.map("virtual_domains")
    ... def virtual_domains(key):
    ...     return "found" if key == "example.com" else None
    >>> server.listen_and_serve("127.0.0.1:27823")  # doctest: +SKIP
    """

    def __init__(self, config: Config | None = None) -> None:
        if config is not None and not isinstance(config, Config):
            usage.wrong_type("config", config, "a Config, or nothing")
        self._config = config or Config()
        self._registered = Registered()
        self._lock = threading.RLock()
        self._changing = threading.RLock()
        self._is_changing = False
        self._foreground: Foreground | None = None
        self._background: BackgroundMaster | None = None
        self._is_worker = False
        self._closed = False

    def __repr__(self) -> str:
        found = self._registered
        names = [*found.maps, *(["(default)"] if found.default else [])]
        where = [*map(str, found.endpoints), *(f"descriptor {sock.fileno()}" for sock in found.sockets)]
        state = "closed" if self._closed else "serving" if self._is_serving() else "not serving"
        return f"<Server: maps {names}, endpoints {where}, {state}>"

    # What to serve.

    def map(self, name: str) -> Callable[[AnyLookup], AnyLookup]:
        """Return a decorator that registers a function as the map *name*."""
        _check_name(name)

        def register(function: AnyLookup) -> AnyLookup:
            self.register_map(name, function)
            return function

        return register

    def register_map(self, name: str, function: Lookup | AsyncLookup) -> None:
        """Answer lookups in the map *name* with ``function(key)``.

        Raises ValueError for a bad or a known name, TypeError for what is no such function.
        """
        _check_name(name)
        added = Function(function, usage.check_function(function, "key"))

        def add(found: Registered) -> Registered:
            if name in found.maps:
                raise ValueError(f"the map {name!r} is registered already")
            return found._replace(maps={**found.maps, name: added})

        self._change(add)

    def default_map(self, function: AnyDefaultLookup) -> AnyDefaultLookup:
        """Register a function for all other map names; usable as a decorator."""
        self.register_default_map(function)
        return function

    def register_default_map(self, function: DefaultLookup | AsyncDefaultLookup) -> None:
        """Answer lookups in any other map with ``function(name, key)``.

        Raises ValueError if there is one already, TypeError for what is no such function.
        """
        added = Function(function, usage.check_function(function, "name", "key"))

        def add(found: Registered) -> Registered:
            if found.default:
                raise ValueError("a default map is registered already")
            return found._replace(default=added)

        self._change(add)

    def on_worker_start(self, function: AnyFunction) -> AnyFunction:
        """Run ``function()`` in each worker before it serves, to open database connections there; a decorator too.

        It may be a coroutine function. An exception keeps the worker from starting.
        """
        added = Function(function, usage.check_function(function))
        self._change(lambda found: found._replace(starts=(*found.starts, added)))
        return function

    def on_worker_stop(self, function: AnyFunction) -> AnyFunction:
        """Run ``function()`` in each worker that leaves, after its last lookup; a decorator too.

        It may be a coroutine function. Those that were registered last run first. An exception goes to the log. A
        worker that is killed runs none.
        """
        added = Function(function, usage.check_function(function))
        self._change(lambda found: found._replace(stops=(added, *found.stops)))
        return function

    # Where to serve.

    def listen(self, endpoint: str | Endpoint | socket.socket | int) -> None:
        """Add an endpoint: ``"inet:host:port"``, ``"unix:/path"``, an ``Endpoint``, or a socket or its descriptor.

        A socket has to be bound. It stays the caller's, who closes it in the end; until then clients can connect to
        it, served or not. Raises SettingError for a text that is no endpoint, ValueError for a socket that cannot be
        served, TypeError for anything else.
        """
        if usage.is_socket(endpoint):
            self._add_socket(endpoint)
            return
        from prefork_socketmap.prefork.listener import Endpoint  # here: it is a quarter of what an import takes

        if isinstance(endpoint, str):
            endpoint = Endpoint.parse(endpoint, self._config.port)
        elif not isinstance(endpoint, Endpoint):
            usage.wrong_type("endpoint", endpoint, _ENDPOINT)
        added = endpoint
        self._change(lambda found: found._replace(endpoints=(*found.endpoints, added)))

    def _add_socket(self, found: socket.socket | int) -> None:
        sock = usage.bound_socket(found)
        try:
            self._change(lambda found: found._replace(sockets=(*found.sockets, sock)))
        except BaseException:
            sock.close()
            raise

    def listen_and_serve(self, address: str = "") -> None:
        """Serve on a TCP *address*, ``"host:port"``, until stopped; what is missing is 127.0.0.1, and Config.port.

        Raises SettingError for what is no address, and what ``serve_forever`` raises. The address is forgotten then.
        """
        if not isinstance(address, str):
            usage.wrong_type("address", address, 'a str, "host:port"')
        from prefork_socketmap.prefork.listener import Endpoint

        self._serve([Endpoint.parse_inet(address, self._config.port)])

    def listen_and_serve_unix(self, path: str | os.PathLike[str]) -> None:
        """Serve on a Unix socket at *path*, mode 0666, until stopped. The path is forgotten then."""
        found = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(found, str):
            usage.wrong_type("path", path, "the path of a socket, a str or a Path")
        if not found:
            raise ValueError("path: an empty path is not accepted here; expected that of a socket")
        from prefork_socketmap.prefork.listener import Endpoint

        self._serve([Endpoint("unix", path=found)])

    def serve(self, sock: socket.socket | int) -> None:
        """Serve on *sock*, a bound or listening socket or its descriptor, until stopped; see ``listen``."""
        if not usage.is_socket(sock):
            usage.wrong_type("sock", sock, "a socket or its descriptor")
        with usage.bound_socket(sock) as bound:
            self._serve(sockets=[bound])

    # Serving.

    def serve_forever(self) -> None:
        """Be the master process until stopped: by TERM (graceful), INT or QUIT (at once), or the methods below.

        HUP replaces the workers. In another thread than the main one, signals are left alone; a program with several
        threads had better use ``start``, since workers are forked from the process that serves. Raises ListenError,
        an OSError, for an address that is in use or not ours; StartError when the workers cannot start;
        RuntimeError when there is nothing to serve, or when the server is closed or serving already.
        """
        self._serve()

    def _serve(self, endpoints: Iterable[Endpoint] = (), sockets: Iterable[socket.socket] = ()) -> None:
        """Serve, on these *endpoints* and *sockets*, too."""
        with self._lock:
            make_master = self._master_for([*endpoints], [*sockets])
            from prefork_socketmap.foreground import Foreground

            serving = self._foreground = Foreground(make_master)
        try:
            serving.master.run()
        finally:
            self._foreground = None
            serving.end()

    def start(self) -> RunningServer:
        """Serve in the background, from a process of its own; return when it answers. Raises as ``serve_forever``.

        It stops when this process ends. Use it as a context manager to stop it earlier.
        """
        self._check_is_no_worker("cannot serve itself")
        with self._in_order(), self._lock:
            return self._start_by(self._master_for([], []))

    def _start_on(self, endpoint: Endpoint) -> RunningServer:
        """Serve in the background, on *endpoint* and nowhere else: for ``testing``."""
        with self._in_order(), self._lock:
            return self._start_by(self._master_for([endpoint], [], is_all=True))

    def _start_by(self, make_master: MakeMaster) -> RunningServer:
        from prefork_socketmap.background import BackgroundMaster

        self._background = BackgroundMaster(make_master)
        return RunningServer(self, self._background)

    def reload(self) -> None:
        """Replace all workers by new ones, which have to prove themselves first, as HUP does; return when they serve.

        No connection is closed. Raises StartError when they cannot start: then the old ones go on. Raises
        RuntimeError when the server does not serve, or is stopping, or when it is called in a worker or in the thread
        that serves, by a signal handler.
        """
        self._check_may_change()
        with self._in_order():
            foreground, background = self._foreground, self._background
            if foreground:
                foreground.reload()
            elif background and not background.wait(0):
                background.reload()
            else:
                raise RuntimeError("the server does not serve")

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop gracefully: lookups under way are answered. Wait for the end, *timeout* seconds at most.

        Raises TimeoutError when it takes longer; the server goes on stopping. Without a timeout stop_timeout bounds
        it. Called where the server itself runs, from a signal handler, it returns at once. Does nothing when the
        server does not serve. Raises RuntimeError in a worker.
        """
        self._check_is_no_worker("cannot stop the server")
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float)):
            usage.wrong_type("timeout", timeout, "a number of seconds, or None")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout: {timeout!r} is not accepted here; expected a number of seconds, or None")
        self._stop(signal.SIGTERM, timeout)

    def close(self) -> None:
        """Stop at once: lookups under way are lost. The server cannot serve again. An error in a worker."""
        self._check_is_no_worker("cannot stop the server")
        self._closed = True
        self._stop(signal.SIGQUIT, None)
        sockets, self._registered = self._registered.sockets, self._registered._replace(sockets=())
        for sock in sockets:
            sock.close()

    def _stop(self, number: signal.Signals, timeout: float | None) -> None:
        foreground, background = self._foreground, self._background
        timeout = timeout if timeout is None else min(timeout, _LONGEST_WAIT)
        gone = True
        if foreground:
            gone = foreground.stop(number, timeout)
        elif background:
            background.send(number)
            gone = background.wait(timeout)
        if not gone:
            raise TimeoutError(f"the server has not stopped within {timeout} s; it goes on stopping")

    # How it is done.

    def _is_serving(self) -> bool:
        return bool(self._foreground or (self._background and not self._background.wait(0)))

    def _check_is_no_worker(self, problem: str) -> None:
        if self._is_worker:
            raise RuntimeError(f"this is a worker, which {problem}")

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Let one change follow the other: of this thread, too, whose signal handlers cannot wait for it."""
        with self._changing:
            if self._is_changing:
                raise RuntimeError("this thread waits for another change of the server: a signal handler cannot")
            self._is_changing = True
            try:
                yield
            finally:
                self._is_changing = False

    def _check_may_change(self) -> None:
        self._check_is_no_worker("cannot change the server: nobody else would know")
        if self._foreground:
            self._foreground.check_may_wait()

    def _change(self, change: Callable[[Registered], Registered]) -> None:
        """Apply *change*; if the server serves, to all workers, or to nothing."""
        self._check_may_change()
        with self._in_order():
            with self._lock:
                before, serving = self._registered, self._foreground
                after = change(before)
                if not serving and self._is_serving():
                    raise RuntimeError(
                        "after start() another process serves, which has none of this one's functions: "
                        "stop it first, or serve in a thread"
                    )
                if after.is_async:
                    # Now, once: workers share the memory of what was imported before they were forked.
                    import prefork_socketmap.asynchronous  # noqa: F401
                self._registered = after
            if serving:
                try:
                    serving.reload()
                except BaseException:
                    self._registered = before
                    raise

    def _check_may_serve(self, *, has_endpoint: bool) -> None:
        self._check_is_no_worker("cannot serve itself")
        if self._closed:
            raise RuntimeError("the server is closed")
        if self._is_serving():
            raise RuntimeError("the server is serving already")
        if not self._registered.maps and not self._registered.default:
            raise RuntimeError("no map is registered: there is nothing to serve")
        if not (has_endpoint or self._registered.endpoints or self._registered.sockets):
            raise RuntimeError("no endpoint is named: call listen() first")

    def _master_for(
        self, endpoints: list[Endpoint], sockets: list[socket.socket], *, is_all: bool = False
    ) -> MakeMaster:
        """Return what makes a master that serves on *endpoints* and *sockets* and, unless that *is_all*, on ours."""
        self._check_may_serve(has_endpoint=bool(endpoints or sockets))
        # Here: a program that only registers, for its tests or its documentation, has no use for a process model.
        from prefork_socketmap.foreground import master_maker

        return master_maker(
            lambda: self._registered, self._config, endpoints, sockets, self._note_worker, is_all=is_all
        )

    def _note_worker(self) -> None:
        self._is_worker = True


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        usage.wrong_type("name", name, 'the name of a map, a str, as in @server.map("name")')
    if not name or " " in name or not _is_encodable(name):
        raise ValueError(f"{name!r} cannot be a map's name: a space ends the name in a request, and it is not empty")


def _is_encodable(name: str) -> bool:
    try:
        return bool(to_bytes(name))
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return False


class RunningServer:
    """A server that was started in the background; leaving its ``with`` block stops it gracefully."""

    def __init__(self, server: Server, background: BackgroundMaster) -> None:
        self._server = server
        self._background = background

    def __repr__(self) -> str:
        state = f"pid {self.pid}, endpoints {self.endpoints}" if self.pid else "stopped"
        return f"<RunningServer: {state}>"

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
