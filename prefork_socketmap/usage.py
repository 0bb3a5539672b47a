"""Wrong usage of the library: found when it happens, and told with the argument, what came and what is accepted."""

from __future__ import annotations

import socket
from typing import NoReturn, TypeGuard

from prefork_socketmap.settings import shown


def wrong_type(argument: str, found: object, accepted: str) -> NoReturn:
    """Raise the TypeError that says: *found* came as *argument*, but only *accepted* is accepted."""
    raise TypeError(f"{argument}: {_shown(found)} is not accepted here; expected {accepted}")


def _shown(value: object) -> str:
    return f"the function {value.__qualname__}" if hasattr(value, "__qualname__") else shown(value)


def check_function(function: object, *parameters: str) -> bool:
    """Raise a TypeError unless *function* takes *parameters*; return whether it is a coroutine function."""
    import inspect  # here: a program that serves maps of a config file has no use for it

    call = f"function({', '.join(parameters)})"
    if not callable(function):
        wrong_type("function", function, f"something that can be called: {call}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        wrong_type("function", function, "one that returns its answer; this one yields")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False  # of a builtin that does not tell
    try:
        signature.bind(*parameters)
    except TypeError as error:
        wrong_type("function", function, f"one that can be called as {call}; {signature} cannot: {error}")
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of an object, not whether there is one
    )


def is_socket(found: object) -> TypeGuard[socket.socket | int]:
    """Whether *found* is a socket, or what may be a descriptor."""
    return isinstance(found, socket.socket | int) and not isinstance(found, bool)


def bound_socket(found: socket.socket | int) -> socket.socket:
    """Return a duplicate of *found*, a socket or its descriptor. Raises ValueError for one that cannot be served."""
    try:
        sock = found.dup() if isinstance(found, socket.socket) else socket.socket(fileno=_duplicate(found))
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"sock: {_shown(found)} is no open socket ({reason}); expected {_ACCEPTED}") from None
    if problem := _problem_of(sock):
        sock.close()
        raise ValueError(f"sock: {problem}; expected {_ACCEPTED}")
    return sock


_ACCEPTED = "a bound or listening stream socket, TCP or Unix, or its descriptor"


def _duplicate(fd: int) -> int:
    import fcntl  # here, since there is none where clients run

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def _problem_of(sock: socket.socket) -> str:
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or sock.type != socket.SOCK_STREAM:
        return f"a socket of {sock.family.name}, {sock.type.name} is not accepted here"
    address = sock.getsockname()
    if not (address if sock.family == socket.AF_UNIX else address[1]):
        return "the socket is not bound"
    try:
        sock.getpeername()
    except OSError:
        return ""
    return "the socket is connected to somebody"
