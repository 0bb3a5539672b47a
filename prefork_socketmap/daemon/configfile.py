"""The config file: TOML in, ``Settings`` out, every value checked but those of the maps.

The tables of the maps are handed on as they are: only a worker, or ``check``, imports what can read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefork_socketmap import settings
from prefork_socketmap.config import Config
from prefork_socketmap.daemon import privileges
from prefork_socketmap.daemon.privileges import Account
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.settings import SettingError

DEFAULT_PATH = Path("/etc/prefork-socketmap/prefork-socketmap.toml")
DEFAULT_RUNTIME_DIR = Path("/run/prefork-socketmap")
PID_FILE_NAME = "prefork-socketmap.pid"
DEFAULT_MAP = "default_map"
METRICS_PORT = 9127

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Table = Mapping[str, object]

_LOOPBACK = ["127.0.0.0/8", "::1/128"]
_LEVELS = ("debug", "info", "warning", "error")
_DESTINATIONS = ("stderr", "syslog")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_SOCKET = 107  # unix(7): sun_path has 108, and the end of the text is one of them
_MODE = re.compile(r"0?[0-7]{3}")
_KEYS = (
    "listen",
    "allow",
    "user",
    "group",
    "environment",
    "pid_file",
    "runtime_dir",
    "log",
    "metrics",
    "maps",
    "default_map",
)
_LISTEN_KEYS = ("endpoint", "mode", "owner", "group", "backlog")


@dataclass(frozen=True)
class LogSettings:
    """The table ``[log]``."""

    to: str = "stderr"
    """``"stderr"`` or ``"syslog"``; a daemon that has detached always takes syslog."""
    level: str = "info"
    """The least important kind of line that is logged."""
    lookups: bool = False
    """Whether each lookup is logged, at level info."""
    budget: int = 100_000
    """The most bytes that a process logs in a minute, apart from lookups and debugging; 0: no limit."""


@dataclass(frozen=True)
class Places:
    """Where a running server is found: all that ``stop``, ``reload`` and ``status`` need to know."""

    runtime_dir: Path = DEFAULT_RUNTIME_DIR
    pid_file: Path = DEFAULT_RUNTIME_DIR / PID_FILE_NAME
    are_defaults: bool = True
    """Whether the file names neither: then it is no error that they cannot be written."""

    @property
    def state_file(self) -> Path:
        """What the master tells about itself."""
        return self.runtime_dir / "state.json"

    @property
    def scoreboard(self) -> Path:
        """What master and workers write about what they do."""
        return self.runtime_dir / "scoreboard"

    @property
    def backends(self) -> Path:
        """What workers know of the backends of their maps."""
        return self.runtime_dir / "backends"

    def with_pid_file(self, path: Path | None) -> Places:
        """Return these places, but with another pid file if *path* is one."""
        return dataclasses.replace(self, pid_file=path, are_defaults=False) if path else self


@dataclass(frozen=True)
class Settings:
    """What a config file says. ``base`` is its directory, where relative paths begin."""

    path: Path
    config: Config
    endpoints: tuple[Endpoint, ...]
    allow: tuple[Network, ...]
    account: Account | None
    environment: tuple[str, ...]
    """Names of variables that workers have beside those that they always have."""
    places: Places
    log: LogSettings
    metrics: Endpoint | None
    """Where the metrics process listens; None: there is none."""
    maps: Mapping[str, Table] = dataclasses.field(repr=False)  # passwords are in them
    default_map: Table | None = dataclasses.field(repr=False)

    @property
    def base(self) -> Path:
        """The directory of the file."""
        return self.path.parent


@contextlib.contextmanager
def errors_in(path: Path) -> Iterator[None]:
    """Name the file *path* in each SettingError that is raised inside."""
    try:
        yield
    except SettingError as error:
        raise in_file(path, error) from error


def in_file(path: Path, error: SettingError) -> SettingError:
    """Return *error* with the name of the file *path* in front."""
    # The default map is built as one among the others, but is not written there.
    key = error.key.removeprefix("maps.") if error.key.startswith(f"maps.{DEFAULT_MAP}.") else error.key
    return type(error)(f"{path}: {key}" if key else str(path), error.problem)


def load(path: Path) -> Settings:
    """Read the config file at *path*. Raises SettingError, which begins with the file's name, for what is wrong."""
    with errors_in(path):
        return _settings(path.absolute(), _parse(path))


def load_places(path: Path) -> Places:
    """Read from the config file only where its server is found; nothing else in it has to be right."""
    with errors_in(path):
        return _places(path.absolute().parent, _parse(path))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SettingError("", f"not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SettingError("", f"not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SettingError("", f"cannot be read: {error.strerror}") from error


def _settings(path: Path, document: dict[str, Any]) -> Settings:
    limits = [field.name for field in dataclasses.fields(Config)]
    settings.reject_unknown("", document, (*_KEYS, *limits))
    config = Config(**{name: value for name, value in document.items() if name in limits})
    maps = {
        name: settings.table(f"maps.{name}", value)
        for name, value in settings.table("maps", document.get("maps", {})).items()
    }
    if DEFAULT_MAP in maps:
        raise SettingError(f"maps.{DEFAULT_MAP}", "the name is taken; the default map is the table [default_map]")
    default_map = settings.table(DEFAULT_MAP, document[DEFAULT_MAP]) if DEFAULT_MAP in document else None
    if not maps and default_map is None:
        raise SettingError("maps", "there is no map; add a table [maps.NAME], or [default_map]")
    return Settings(
        path=path,
        config=config,
        endpoints=tuple(
            dataclasses.replace(endpoint, source=f"{path}: listen[{index}]")
            for index, endpoint in enumerate(
                _endpoints(document.get("listen", ["inet:127.0.0.1"]), path.parent, config.port)
            )
        ),
        allow=_networks(document.get("allow", _LOOPBACK)),
        account=_account(document),
        environment=_environment(document.get("environment", [])),
        places=_places(path.parent, document),
        log=_log(document.get("log", {})),
        metrics=_metrics(document["metrics"], path) if "metrics" in document else None,
        maps=maps,
        default_map=default_map,
    )


def _endpoints(value: object, base: Path, default_port: int) -> tuple[Endpoint, ...]:
    if not isinstance(value, list) or not value:
        raise settings.wrong("listen", value, "a list of endpoints that is not empty")
    found = tuple(_endpoint(f"listen[{index}]", item, base, default_port) for index, item in enumerate(value))
    for index, endpoint in enumerate(found):
        if endpoint in found[:index]:
            raise SettingError(f"listen[{index}]", f"{settings.shown(str(endpoint))} stands there twice")
    return found


def _endpoint(key: str, value: object, base: Path, default_port: int) -> Endpoint:
    options = {"endpoint": value} if isinstance(value, str) else value
    if not isinstance(options, dict):
        raise settings.wrong(key, value, "an endpoint, or a table with one")
    settings.reject_unknown(f"{key}.", options, _LISTEN_KEYS)
    if "endpoint" not in options:
        raise SettingError(f"{key}.endpoint", "is missing")
    try:
        endpoint = Endpoint.parse(settings.text(key, options["endpoint"]), default_port)
    except SettingError as error:
        raise SettingError(key, error.problem) from error
    if endpoint.kind == "unix":
        endpoint = dataclasses.replace(endpoint, path=str(base / endpoint.path))
        if len(os.fsencode(endpoint.path)) > _LONGEST_SOCKET:
            problem = f"the path of a socket has at most {_LONGEST_SOCKET} bytes, and {endpoint.path} is longer"
            raise SettingError(key, problem)
    elif of_a_file := [option for option in ("mode", "owner", "group") if option in options]:
        raise SettingError(f"{key}.{of_a_file[0]}", "only the socket of a unix: endpoint has one")
    return dataclasses.replace(
        endpoint,
        mode=_mode(f"{key}.mode", options["mode"]) if "mode" in options else None,
        owner=_owner(f"{key}.owner", options["owner"]) if "owner" in options else "",
        group=_group(f"{key}.group", options["group"]) if "group" in options else "",
        backlog=settings.count(f"{key}.backlog", options["backlog"], 1, 65535) if "backlog" in options else None,
    )


def _mode(key: str, value: object) -> int:
    # A TOML integer does not tell whether it was written in octal, and 660 would silently become 01224.
    if isinstance(value, str) and _MODE.fullmatch(value):
        return int(value, 8)
    raise settings.wrong(key, value, 'a string of octal digits like "0660"')


def _owner(key: str, value: object) -> str:
    name = settings.text(key, value)
    privileges.find_user(key, name)
    return name


def _group(key: str, value: object) -> str:
    name = settings.text(key, value)
    privileges.find_group(key, name)
    return name


def _networks(value: object) -> tuple[Network, ...]:
    return tuple(_network(text) for text in settings.texts("allow", value))


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        accepted = 'a network like "192.0.2.0/24", with no bit set behind its prefix, or an address'
        raise settings.wrong("allow", text, accepted) from None


def _account(document: Table) -> Account | None:
    if "user" in document:
        return Account.find(
            settings.text("user", document["user"]),
            settings.text("group", document["group"]) if "group" in document else None,
        )
    if "group" in document:
        raise SettingError("group", "has an effect only together with user, which is missing")
    return None


def _environment(value: object) -> tuple[str, ...]:
    names = settings.texts("environment", value)
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise settings.wrong("environment", name, "names of environment variables, without values")
    return names


def _places(base: Path, document: Table) -> Places:
    if not document.keys() & {"runtime_dir", "pid_file"}:
        return Places()
    runtime_dir = base / settings.text("runtime_dir", document.get("runtime_dir", str(DEFAULT_RUNTIME_DIR)))
    pid_file = base / settings.text("pid_file", document.get("pid_file", str(runtime_dir / PID_FILE_NAME)))
    return Places(runtime_dir, pid_file, are_defaults=False)


def _metrics(value: object, path: Path) -> Endpoint:
    table = settings.table("metrics", value)
    settings.reject_unknown("metrics.", table, ["listen"])
    key = "metrics.listen"
    text = settings.text(key, table.get("listen", f"127.0.0.1:{METRICS_PORT}"))
    try:
        endpoint = Endpoint.parse_inet(text, METRICS_PORT)
        ipaddress.ip_address(endpoint.host)
    except ValueError:
        raise settings.wrong(key, text, 'an IP address with a port, like "127.0.0.1:9127" or "[::1]:9127"') from None
    if not endpoint.port:
        raise settings.wrong(key, text, "a port from 1 to 65535")
    return dataclasses.replace(endpoint, source=f"{path}: {key}")


def _log(value: object) -> LogSettings:
    table = settings.table("log", value)
    settings.reject_unknown("log.", table, [field.name for field in dataclasses.fields(LogSettings)])
    default = LogSettings()
    return LogSettings(
        to=settings.choice("log.to", table.get("to", default.to), _DESTINATIONS),
        level=settings.choice("log.level", table.get("level", default.level), _LEVELS),
        lookups=settings.boolean("log.lookups", table.get("lookups", default.lookups)),
        budget=settings.count("log.budget", table.get("budget", default.budget)),
    )
