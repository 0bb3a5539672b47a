"""A preforking server for Postfix ``socketmap:`` lookup tables.

Register functions with a ``Server`` and serve; see prefork_socketmap(3). The daemon ``prefork-socketmap`` serves maps
that a config file declares; see prefork-socketmap(8).
"""

from prefork_socketmap.config import Config
from prefork_socketmap.prefork.listener import Endpoint, ListenError
from prefork_socketmap.prefork.succession import StartError
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
