"""Config: the limits and timeouts of a server, with their defaults, checked when they are set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefork_socketmap import settings

if TYPE_CHECKING:

    class Seconds:
        """A time: set as a number of seconds or as ``"5m"``, read as a number of seconds."""

        def __get__(self, _config: object, _owner: type | None = None) -> float: ...
        def __set__(self, _config: object, _value: float | str) -> None: ...


def _seconds(default: float) -> Any:
    return dataclasses.field(default=default, metadata={"read": settings.seconds})


def _count(default: int, minimum: int = 0, maximum: int | None = None) -> Any:
    def read(key: str, value: object) -> int:
        return settings.count(key, value, minimum, maximum)

    return dataclasses.field(default=default, metadata={"read": read})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The limits and timeouts of a server.

    Times are in seconds (a Postfix time value such as ``"5m"`` is accepted as well), sizes in bytes. 0 switches a
    timeout or a limit off, where it does not say otherwise. A wrong value raises ``settings.SettingError``, a
    ValueError, that names the field and what it accepts.
    """

    port: int = _count(27823, 1, 65535)
    """TCP port where an address names none."""
    read_timeout: Seconds = _seconds(100.0)
    """From a request's first byte to its last, however slowly they arrive."""
    write_timeout: Seconds = _seconds(100.0)
    """For one reply."""
    idle_timeout: Seconds = _seconds(10.0)
    """After so much silence a connection may be closed to make room for a new one; 0: never."""
    lookup_timeout: Seconds = _seconds(30.0)
    """How long one lookup may take; then it is interrupted and the client gets TIMEOUT."""
    max_request_size: int = _count(100000, 1)
    """Longest request payload. A longer one is refused before it is read, and the connection closed."""
    max_reply_size: int = _count(100000)
    """Longest reply payload, ``OK `` included. Postfix accepts 100000 and no more."""
    process_limit: int = _count(100, 1, 10000)
    """The most workers at a time, as in master(5)."""
    min_spare: int = _count(5, 1, 10000)
    """How many workers are kept ready for the next connection, within process_limit."""
    max_use: int = _count(0)
    """A worker is replaced after about so many lookups (varied by a tenth)."""
    max_idle: Seconds = _seconds(100.0)
    """A worker beyond the spare ones leaves after so long without a connection."""
    max_connections: int = _count(0)
    """The most connections at a time; 0: as many as the limit of open files allows. For one more, the connection that
    has been silent for longest is closed, if it is idle; otherwise the new one is refused."""
    keepalive_timeout: Seconds = _seconds(3600.0)
    """How long a silent connection is kept open; 0: for ever."""
    stop_timeout: Seconds = _seconds(30.0)
    """How long a graceful stop waits for lookups under way before it kills them."""
    backlog: int = _count(4096, 1, 65535)
    """Length of each listener's accept queue; the kernel may cut it (net.core.somaxconn)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["read"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


class _Documentation:
    """The docstring of Config with those of its fields, which Python keeps nowhere: read when somebody asks."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, _config: object, owner: type) -> str:
        import ast
        import inspect
        import textwrap

        try:
            body = ast.parse(inspect.getsource(owner)).body[0]
        except (OSError, SyntaxError):
            return self._text  # the source is not there
        lines = [self._text.rstrip(), ""]
        field = ""
        for each in getattr(body, "body", ()):
            if isinstance(each, ast.AnnAssign):
                field = ast.unparse(each.target)
            elif field and isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                text = " ".join(str(each.value.value).split())
                text = f"{field} (default {getattr(owner, field)}): {text}"
                lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        "))
        return "\n".join(lines)


Config.__doc__ = _Documentation(Config.__doc__ or "")  # type: ignore[assignment]
