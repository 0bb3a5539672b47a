"""The config file: what it means, and what each mistake in it is answered with."""

from __future__ import annotations

from dataclasses import fields
from ipaddress import ip_network
from pathlib import Path

import pytest

from prefork_socketmap.config import Config
from prefork_socketmap.daemon import configfile
from prefork_socketmap.daemon.configfile import LogSettings, Settings
from prefork_socketmap.prefork.listener import Endpoint
from prefork_socketmap.settings import SettingError

MAP = '[maps.m]\ntype = "static"\nentries = { k = "v" }\n'


def load(directory: Path, text: str) -> Settings:
    file = directory / "file.toml"
    file.write_text(text)
    return configfile.load(file)


def test_a_file_with_a_map_is_enough(tmp_path: Path) -> None:
    settings = load(tmp_path, MAP)
    assert settings.config == Config()
    assert settings.endpoints == (Endpoint.parse("inet:127.0.0.1:27823"),)
    assert settings.allow == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert settings.account is None
    assert settings.places.pid_file == Path("/run/prefork-socketmap/prefork-socketmap.pid")
    assert settings.log == LogSettings(to="stderr", level="info", lookups=False)
    assert settings.maps == {"m": {"type": "static", "entries": {"k": "v"}}}
    assert settings.default_map is None


def test_every_field_of_config_is_a_key(tmp_path: Path) -> None:
    changed = {field.name: getattr(Config(), field.name) + 1 for field in fields(Config)}
    lines = "".join(f"{name} = {value}\n" for name, value in changed.items())
    assert load(tmp_path, lines + MAP).config == Config(**changed)


def test_times_can_be_written_as_in_main_cf(tmp_path: Path) -> None:
    assert load(tmp_path, 'lookup_timeout = "2m"\n' + MAP).config.lookup_timeout == 120


def test_relative_paths_begin_at_the_directory_of_the_file(tmp_path: Path) -> None:
    settings = load(tmp_path, 'listen = ["unix:sock"]\nruntime_dir = "run"\n' + MAP)
    assert settings.endpoints[0].path == str(tmp_path / "sock")
    assert settings.places.runtime_dir == tmp_path / "run"
    assert settings.places.pid_file == tmp_path / "run/prefork-socketmap.pid"


def test_a_listener_has_options_of_its_own(tmp_path: Path) -> None:
    text = 'listen = [{ endpoint = "unix:/s", mode = "0660", owner = "nobody", group = "daemon", backlog = 9 }]\n'
    (endpoint,) = load(tmp_path, text + MAP).endpoints
    assert (endpoint.mode, endpoint.owner, endpoint.group, endpoint.backlog) == (0o660, "nobody", "daemon", 9)


def test_an_endpoint_without_a_port_takes_the_configured_one(tmp_path: Path) -> None:
    settings = load(tmp_path, 'port = 999\nlisten = ["inet:127.0.0.1", "inet:[::1]", "inet:127.0.0.1:998"]\n' + MAP)
    assert [endpoint.port for endpoint in settings.endpoints] == [999, 999, 998]


def test_the_group_of_the_workers_is_the_users_own_unless_one_is_named(tmp_path: Path) -> None:
    own = load(tmp_path, 'user = "nobody"\n' + MAP).account
    named = load(tmp_path, 'user = "nobody"\ngroup = "daemon"\n' + MAP).account
    assert own
    assert named
    assert own.uid == named.uid
    assert own.gid != named.gid
    assert own.gid in own.groups


def test_the_places_are_found_in_a_file_that_is_wrong_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "file.toml"
    file.write_text('runtime_dir = "/r"\nlisten = 5\nnonsense = 1\n')
    assert configfile.load_places(file).pid_file == Path("/r/prefork-socketmap.pid")


TIME = 'a number of seconds from 0 to 2147483647, or a time like "10s", "5m", "1h"'
ENDPOINT = '"inet:host:port", "inet:[ipv6]:port" or "unix:/path"'
PORT = f"a port from 0 to 65535 in {ENDPOINT}; an IPv6 address stands in brackets"
NETWORK = 'expected a network like "192.0.2.0/24", with no bit set behind its prefix, or an address'
MODE = 'expected a string of octal digits like "0660"'
TEXT = "a string that is not empty"

WRONG = [
    # Not TOML, or not text.
    ("a = \n", "not TOML: Invalid value (at line 1, column 5)"),
    ("a\n", "not TOML: Expected '=' after a key in a key/value pair (at line 1, column 2)"),
    ("port = 1\nport = 2\n", "not TOML: Cannot overwrite a value (at line 2, column 9)"),
    (MAP + "[maps.m]\n", "not TOML: Cannot declare ('maps', 'm') twice (at line 4, column 8)"),
    # Names.
    ("lisen = 1\n", 'lisen: unknown key; did you mean "listen"?'),
    ("proces_limit = 1\n", 'proces_limit: unknown key; did you mean "process_limit"?'),
    ("[map.m]\n", 'map: unknown key; did you mean "maps"?'),
    ('[default-map]\ntype = "static"\n', 'default-map: unknown key; did you mean "default_map"?'),
    # Limits and times.
    ("port = 0\n", "port: 0 is not accepted here; expected a whole number of at least 1 and at most 65535"),
    ("port = 65536\n", "port: 65536 is not accepted here; expected a whole number of at least 1 and at most 65535"),
    ('port = "80"\n', "port: '80' is not accepted here; expected a whole number of at least 1 and at most 65535"),
    (
        "process_limit = 0\n",
        "process_limit: 0 is not accepted here; expected a whole number of at least 1 and at most 10000",
    ),
    (
        "min_spare = 1.5\n",
        "min_spare: 1.5 is not accepted here; expected a whole number of at least 1 and at most 10000",
    ),
    ("max_use = -1\n", "max_use: -1 is not accepted here; expected a whole number of at least 0"),
    ("max_reply_size = true\n", "max_reply_size: True is not accepted here; expected a whole number of at least 0"),
    ("read_timeout = -1\n", f"read_timeout: -1 is not accepted here; expected {TIME}"),
    ('lookup_timeout = "10 s"\n', f"lookup_timeout: '10 s' is not accepted here; expected {TIME}"),
    ('idle_timeout = "1h30m"\n', f"idle_timeout: '1h30m' is not accepted here; expected {TIME}"),
    ("stop_timeout = inf\n", f"stop_timeout: inf is not accepted here; expected {TIME}"),
    ("keepalive_timeout = []\n", f"keepalive_timeout: [] is not accepted here; expected {TIME}"),
    # Listeners.
    (
        'listen = "inet:127.0.0.1"\n',
        "listen: 'inet:127.0.0.1' is not accepted here; expected a list of endpoints that is not empty",
    ),
    ("listen = []\n", "listen: [] is not accepted here; expected a list of endpoints that is not empty"),
    ("listen = [27823]\n", "listen[0]: 27823 is not accepted here; expected an endpoint, or a table with one"),
    ('listen = [""]\n', f"listen[0]: '' is not accepted here; expected {TEXT}"),
    ('listen = ["127.0.0.1:27823"]\n', f"listen[0]: '127.0.0.1:27823' is not accepted here; expected {ENDPOINT}"),
    ('listen = ["inet:h", "tcp:h:1"]\n', f"listen[1]: 'tcp:h:1' is not accepted here; expected {ENDPOINT}"),
    ('listen = ["inet:h:65536"]\n', f"listen[0]: 'h:65536' is not accepted here; expected {PORT}"),
    ('listen = ["inet:::1:27823"]\n', f"listen[0]: '::1:27823' is not accepted here; expected {PORT}"),
    ('listen = ["inet:[::1:27823"]\n', f"listen[0]: '[::1:27823' is not accepted here; expected {ENDPOINT}"),
    ('listen = ["unix:"]\n', f"listen[0]: 'unix:' is not accepted here; expected {ENDPOINT}"),
    ('listen = ["inet:h:1", "inet:h:1"]\n', "listen[1]: 'inet:h:1' stands there twice"),
    ("listen = [{}]\n", "listen[0].endpoint: is missing"),
    ('listen = [{ endpiont = "unix:/s" }]\n', 'listen[0].endpiont: unknown key; did you mean "endpoint"?'),
    ('listen = [{ endpoint = "unix:/s", mode = 660 }]\n', f"listen[0].mode: 660 is not accepted here; {MODE}"),
    ('listen = [{ endpoint = "unix:/s", mode = "0888" }]\n', f"listen[0].mode: '0888' is not accepted here; {MODE}"),
    (
        'listen = [{ endpoint = "unix:/s", owner = "no-such-user" }]\n',
        "listen[0].owner: there is no user 'no-such-user'",
    ),
    (
        'listen = [{ endpoint = "unix:/s", group = "no-such-group" }]\n',
        "listen[0].group: there is no group 'no-such-group'",
    ),
    (
        'listen = [{ endpoint = "unix:/s", backlog = 0 }]\n',
        "listen[0].backlog: 0 is not accepted here; expected a whole number of at least 1 and at most 65535",
    ),
    (
        'listen = [{ endpoint = "inet:h", mode = "0660" }]\n',
        "listen[0].mode: only the socket of a unix: endpoint has one",
    ),
    # Who may connect.
    ('allow = "127.0.0.1"\n', "allow: '127.0.0.1' is not accepted here; expected a list of strings"),
    ('allow = ["10.0.0.1/8"]\n', f"allow: '10.0.0.1/8' is not accepted here; {NETWORK}"),
    ('allow = ["example.com"]\n', f"allow: 'example.com' is not accepted here; {NETWORK}"),
    # Users.
    ('user = "no-such-user"\n', "user: there is no user 'no-such-user'"),
    ("environment = [1]\n", "environment: [1] is not accepted here; expected a list of strings"),
    (
        'environment = ["A=b"]\n',
        "environment: 'A...' is not accepted here; expected names of environment variables, without values",
    ),
    ("user = 0\n", f"user: 0 is not accepted here; expected {TEXT}"),
    ('user = "nobody"\ngroup = "no-such-group"\n', "group: there is no group 'no-such-group'"),
    ('group = "daemon"\n', "group: has an effect only together with user, which is missing"),
    # Places and the log.
    ("pid_file = true\n", f"pid_file: True is not accepted here; expected {TEXT}"),
    ('runtime_dir = ""\n', f"runtime_dir: '' is not accepted here; expected {TEXT}"),
    ('log = "syslog"\n', "log: 'syslog' is not accepted here; expected a table"),
    ('[log]\nlevels = "info"\n', 'log.levels: unknown key; did you mean "level"?'),
    (
        '[log]\nlevel = "notice"\n',
        'log.level: \'notice\' is not accepted here; expected one of "debug", "info", "warning", "error"',
    ),
    ('[log]\nto = "/var/log/x"\n', 'log.to: \'/var/log/x\' is not accepted here; expected one of "stderr", "syslog"'),
    ('[log]\nlookups = "yes"\n', "log.lookups: 'yes' is not accepted here; expected true or false"),
    # Maps, as far as they are read here.
    ("maps = 1\n", "maps: 1 is not accepted here; expected a table"),
    ("[maps]\nm = 1\n", "maps.m: 1 is not accepted here; expected a table"),
    ("default_map = 1\n", "default_map: 1 is not accepted here; expected a table"),
    ("[maps.default_map]\n", "maps.default_map: the name is taken; the default map is the table [default_map]"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_mistake_is_told_with_file_and_key_and_what_is_accepted(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, text if "maps" in text else text + MAP)
    assert str(caught.value) == f"{tmp_path}/file.toml: {message}"


def test_a_file_without_maps_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"maps: there is no map; add a table \[maps.NAME\], or \[default_map\]"):
        load(tmp_path, "")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"{tmp_path}/none.toml: cannot be read: No such file or directory"):
        configfile.load(tmp_path / "none.toml")


def test_a_file_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    (tmp_path / "file.toml").write_bytes(b"# \xe4\n")
    with pytest.raises(SettingError, match="not UTF-8: invalid continuation byte at byte 2"):
        configfile.load(tmp_path / "file.toml")
