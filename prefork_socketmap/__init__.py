"""A preforking server for Postfix ``socketmap:`` lookup tables.

Register functions with a ``Server`` and serve; see prefork_socketmap(3). The daemon ``prefork-socketmap`` serves maps
that a config file declares; see prefork-socketmap(8).

The server is for Linux. ``prefork_socketmap.socketmap``, the protocol, and ``prefork_socketmap.client`` run anywhere:
so the public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefork_socketmap.config import Config
    from prefork_socketmap.prefork.listener import Endpoint, ListenError
    from prefork_socketmap.prefork.reload import StartError
    from prefork_socketmap.server import RunningServer, Server
    from prefork_socketmap.settings import SettingError
    from prefork_socketmap.socketmap.messages import Reply, Status

__all__ = [
    "Config",
    "Endpoint",
    "ListenError",
    "Reply",
    "RunningServer",
    "Server",
    "SettingError",
    "StartError",
    "Status",
]

__version__ = "1.0.0"

_MODULES = {
    "Config": "config",
    "Endpoint": "prefork.listener",
    "ListenError": "prefork.listener",
    "Reply": "socketmap.messages",
    "RunningServer": "server",
    "Server": "server",
    "SettingError": "settings",
    "StartError": "prefork.reload",
    "Status": "socketmap.messages",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
