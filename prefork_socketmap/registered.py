"""What a program has registered with its server, as a value: so each generation of workers has it whole, or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import socket

    from prefork_socketmap.prefork.listener import Endpoint


class Function(NamedTuple):
    """A function that was registered."""

    function: Callable[..., Any]
    is_async: bool


class Registered(NamedTuple):
    """All that a server has been told. It is never changed, but replaced: so a generation has one of it, whole."""

    maps: Mapping[str, Function] = {}
    default: Function | None = None
    starts: tuple[Function, ...] = ()
    stops: tuple[Function, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    sockets: tuple[socket.socket, ...] = ()
    """Duplicates of the program's."""

    @property
    def is_async(self) -> bool:
        """Whether a worker needs an event loop."""
        functions = (*self.maps.values(), *self.starts, *self.stops, *([self.default] if self.default else []))
        return any(each.is_async for each in functions)
