"""Endpoints and listeners: what they are written like, and which files they make, replace, remove and spare."""

from __future__ import annotations

import dataclasses
import grp
import json
import logging
import os
import pwd
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork_socketmap.prefork import listener as listener_module
from prefork_socketmap.prefork.listener import (
    Endpoint,
    Listener,
    ListenError,
    ListenerState,
    open_listener,
    resolve,
    take_in,
)
from prefork_socketmap.settings import SettingError
from tests.integration.servers.process import free_port

BACKLOG = 64


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "socket"


@pytest.fixture
def unix(path: Path) -> Endpoint:
    return Endpoint("unix", path=str(path))


@pytest.fixture
def opened() -> Iterator[list[Listener]]:
    """Listeners that are closed in the end."""
    listeners: list[Listener] = []
    yield listeners
    for listener in listeners:
        listener.close(unlink=True)


def connects(endpoint: Endpoint) -> bool:
    family = socket.AF_UNIX if endpoint.kind == "unix" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        try:
            client.connect(endpoint.path if endpoint.kind == "unix" else (endpoint.host, endpoint.port))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


# Endpoints.


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("inet:127.0.0.1:1234", Endpoint("inet", "127.0.0.1", 1234)),
        ("inet:127.0.0.1:0", Endpoint("inet", "127.0.0.1", 0)),
        ("inet:mail.example:25", Endpoint("inet", "mail.example", 25)),
        ("inet:[::1]:1234", Endpoint("inet", "::1", 1234)),
        ("unix:/run/socketmap", Endpoint("unix", path="/run/socketmap")),
        ("unix:relative", Endpoint("unix", path="relative")),
        ("unix:/with:colon", Endpoint("unix", path="/with:colon")),
    ],
)
def test_an_endpoint_is_read_and_written_alike(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("inet:127.0.0.1", Endpoint("inet", "127.0.0.1", 5000)),
        ("inet:[::1]", Endpoint("inet", "::1", 5000)),
        ("inet:", Endpoint("inet", "127.0.0.1", 5000)),
        ("inet::1234", Endpoint("inet", "127.0.0.1", 1234)),
    ],
)
def test_what_an_endpoint_leaves_out_has_a_default(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text, 5000) == endpoint


@pytest.mark.parametrize("text", ["", "inet", "unix", "unix:", "127.0.0.1:1234", "tcp:127.0.0.1:1234"])
def test_what_has_no_kind_or_an_unknown_one_is_an_error_that_says_what_an_endpoint_is(text: str) -> None:
    with pytest.raises(SettingError, match=r"inet:host:port"):
        Endpoint.parse(text)


@pytest.mark.parametrize("port", ["port", "65536", "-1", "+1", " 1", "1:2", "\u0661"])
def test_what_is_no_port_is_an_error_that_says_what_is_one(port: str) -> None:
    with pytest.raises(SettingError, match=r"a port from 0 to 65535"):
        Endpoint.parse(f"inet:host:{port}")


@pytest.mark.parametrize("text", ["inet:[::1", "inet:[::1]1234", "inet:::1:1234"])
def test_an_ipv6_address_without_its_brackets_is_an_error(text: str) -> None:
    with pytest.raises(SettingError, match=r"inet:host:port"):
        Endpoint.parse(text)


# Opening.


def test_a_listener_tells_the_port_that_the_kernel_chose(opened: list[Listener]) -> None:
    wanted = Endpoint("inet", "127.0.0.1", 0)
    listener = open_listener(wanted, BACKLOG)
    opened.append(listener)
    assert listener.wanted == wanted
    assert listener.endpoint.port > 0
    assert connects(listener.endpoint)


def test_every_address_of_a_host_is_listened_on() -> None:
    assert [address.host for address in resolve(Endpoint("inet", "127.0.0.1", 1))] == ["127.0.0.1"]
    assert {address.host for address in resolve(Endpoint("inet", "localhost", 1))} <= {"127.0.0.1", "::1"}


def test_ipv4_and_ipv6_stand_side_by_side_on_one_port(opened: list[Listener]) -> None:
    opened.append(open_listener(Endpoint("inet", "0.0.0.0", 0), BACKLOG))
    opened.append(open_listener(Endpoint("inet", "::", opened[0].endpoint.port), BACKLOG))


def test_a_restart_need_not_wait_for_the_port(opened: list[Listener]) -> None:
    listener = open_listener(Endpoint("inet", "127.0.0.1", 0), BACKLOG)
    with socket.create_connection(("127.0.0.1", listener.endpoint.port)):
        served, _ = listener.sock.accept()
        served.close()  # first: the port is in TIME_WAIT now
        listener.close()
    opened.append(open_listener(listener.endpoint, BACKLOG))


def test_a_unix_socket_is_open_to_everybody_unless_it_says_otherwise(
    opened: list[Listener], unix: Endpoint, path: Path
) -> None:
    umask = os.umask(0o077)
    try:
        opened.append(open_listener(unix, BACKLOG))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_mode_owner_and_group_are_those_of_the_endpoint(opened: list[Listener], unix: Endpoint, path: Path) -> None:
    user, group = pwd.getpwnam("daemon"), grp.getgrnam("mail")
    opened.append(open_listener(dataclasses.replace(unix, mode=0o660, owner="daemon", group="mail"), BACKLOG))
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, user.pw_uid, group.gr_gid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_owner_and_group_may_be_numbers(opened: list[Listener], unix: Endpoint, path: Path) -> None:
    opened.append(open_listener(dataclasses.replace(unix, owner="12345", group="54321"), BACKLOG))
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


@pytest.mark.parametrize(
    ("field", "text"), [("owner", "no such user: 'nobody-'"), ("group", "no such group: 'nobody-'")]
)
def test_an_owner_that_does_not_exist_is_an_error_that_leaves_nothing(
    unix: Endpoint, path: Path, field: str, text: str
) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {unix}: .*{text}"):
        open_listener(dataclasses.replace(unix, **{field: "nobody-"}), BACKLOG)  # type: ignore[arg-type]
    assert not path.exists()


def test_what_may_change_while_the_socket_stays_is_changed(
    opened: list[Listener], unix: Endpoint, path: Path
) -> None:
    opened.append(open_listener(unix, BACKLOG))
    opened[0].set_up(dataclasses.replace(unix, mode=0o600), BACKLOG)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connects(unix)


def test_a_path_that_is_too_long_or_nowhere_is_an_error_that_names_it(directory: Path) -> None:
    for path in (directory / ("x" * 200), directory / "missing" / "socket"):
        with pytest.raises(ListenError, match=f"cannot listen on unix:{path}"):
            open_listener(Endpoint("unix", path=str(path)), BACKLOG)


def test_an_accept_queue_that_the_kernel_cuts_is_warned_of(
    opened: list[Listener], directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limit = directory / "somaxconn"
    limit.write_text("128\n")
    monkeypatch.setattr(listener_module, "_SOMAXCONN", limit)
    with caplog.at_level(logging.WARNING):
        opened.append(open_listener(Endpoint("inet", "127.0.0.1", 0), 128))
        assert not caplog.messages
        opened.append(open_listener(Endpoint("inet", "127.0.0.1", 0), 129))
    assert "from 129 to 128; raise net.core.somaxconn" in caplog.text


# Files.


def test_a_stale_socket_is_replaced(opened: list[Listener], unix: Endpoint, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    assert path.exists()
    opened.append(open_listener(unix, BACKLOG))
    assert connects(unix)


def test_a_live_socket_is_refused_and_spared(opened: list[Listener], unix: Endpoint) -> None:
    opened.append(open_listener(unix, BACKLOG))
    with pytest.raises(ListenError, match="another process listens on it"):
        open_listener(unix, BACKLOG)
    assert connects(unix)


def test_a_live_socket_whose_queue_is_full_is_refused_too(unix: Endpoint, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(str(path))
        live.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ListenError, match="another process listens on it"):
            open_listener(unix, BACKLOG)
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "broken symlink", "fifo"])
def test_a_file_that_is_no_socket_is_never_removed(unix: Endpoint, path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "symlink":
            (path.parent / "target").write_text("precious")
            path.symlink_to("target")
        case "broken symlink":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
    before = path.lstat().st_ino
    with pytest.raises(ListenError, match="the file exists and is not a socket; remove it or choose another path"):
        open_listener(unix, BACKLOG)
    assert path.lstat().st_ino == before


def test_the_file_is_removed_when_that_is_asked_for_only(unix: Endpoint, path: Path) -> None:
    listener = open_listener(unix, BACKLOG)
    listener.close()
    assert path.exists()
    listener.close(unlink=True)
    assert not path.exists()


def test_a_file_that_has_taken_the_place_of_ours_is_not_removed(unix: Endpoint, path: Path) -> None:
    listener = open_listener(unix, BACKLOG)
    path.unlink()
    path.write_text("somebody else's")
    listener.close(unlink=True)
    assert path.read_text() == "somebody else's"


def test_the_file_of_a_socket_that_was_handed_to_us_stays(unix: Endpoint, path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        Listener(sock).close(unlink=True)
    assert path.exists()


def test_a_listener_that_is_closed_listens_in_no_process(unix: Endpoint) -> None:
    """A worker that is busy holds a duplicate: clients must not wait in its queue."""
    for endpoint in (Endpoint("inet", "127.0.0.1", 0), unix):
        listener = open_listener(endpoint, BACKLOG)
        with listener.sock.dup():
            assert connects(listener.endpoint)
            listener.close()
            assert not connects(listener.endpoint)


def test_a_socket_that_was_handed_to_us_goes_on_listening_elsewhere() -> None:
    with socket.create_server(("127.0.0.1", free_port())) as theirs:
        listener = Listener(theirs.dup())
        listener.close(unlink=True)
        assert connects(listener.endpoint)


# Whoever can write to the directory of a socket can put something else in its place.


@pytest.fixture
def precious(directory: Path) -> Path:
    file = directory / "precious"
    file.write_text("for root's eyes only")
    file.chmod(0o600)
    return file


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
@pytest.mark.parametrize("when", ["reload", "upgrade"])
def test_a_link_in_the_place_of_the_socket_opens_nothing_at_a_reload_or_upgrade(
    unix: Endpoint, path: Path, precious: Path, kind: str, when: str
) -> None:
    listener = open_listener(unix, BACKLOG)
    path.unlink()
    if kind == "symbolic link":
        path.symlink_to(precious)
    else:
        path.hardlink_to(precious)
    if when == "upgrade":
        passed_on = ListenerState(**json.loads(json.dumps(dataclasses.asdict(listener.state()))))
        listener.sock.detach()
        listener = Listener.resume(passed_on)
    before = precious.stat()
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP, or what we say
        listener.set_up(dataclasses.replace(unix, mode=0o666, owner="12345"), BACKLOG)
    listener.close(unlink=True)
    after = precious.stat()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)
    assert path.lstat()


def test_another_socket_in_the_place_of_ours_is_left_as_it_is(
    opened: list[Listener], unix: Endpoint, path: Path
) -> None:
    opened.append(open_listener(unix, BACKLOG))
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(str(path))
        path.chmod(0o600)
        with pytest.raises(OSError, match="another file in the place of the socket"):
            opened[0].set_up(unix, BACKLOG)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kernel_tells", [True, False], ids=["the kernel tells", "the path is opened"])
def test_what_is_put_in_the_place_of_the_socket_between_bind_and_chmod_is_not_touched(
    unix: Endpoint, path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch, *, kernel_tells: bool
) -> None:
    bind = socket.socket.bind

    def bind_and_lose(sock: socket.socket, address: str) -> None:
        bind(sock, address)
        path.unlink()
        path.symlink_to(precious)

    monkeypatch.setattr(socket.socket, "bind", bind_and_lose)
    if not kernel_tells:
        monkeypatch.setattr(listener_module, "_SIOCUNIXFILE", 0)
    with pytest.raises(ListenError):
        open_listener(dataclasses.replace(unix, mode=0o666), BACKLOG)
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600


def test_the_file_of_a_socket_is_closed_to_all_until_it_has_its_owner(
    opened: list[Listener], unix: Endpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    chown = os.chown

    def see(*arguments: Any) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        chown(*arguments)

    monkeypatch.setattr(os, "chown", see)
    umask = os.umask(0)
    try:
        opened.append(open_listener(dataclasses.replace(unix, owner=str(os.geteuid())), BACKLOG))
    finally:
        os.umask(umask)
    assert seen == [0]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "tcp"}, 'kind: \'tcp\' .*"inet", "unix"'),
        ({"kind": "unix"}, "path: ''"),
        ({"kind": "unix", "path": Path("/x")}, "path: a PosixPath"),
        ({"kind": "unix", "path": "/a\0b"}, "path: .*without a NUL"),
        ({"kind": "inet"}, "host: ''"),
        ({"kind": "inet", "host": "h", "port": "25"}, "port: '25' .*at most 65535"),
        ({"kind": "inet", "host": "h", "port": 70000}, "port: 70000"),
        ({"kind": "unix", "path": "/x", "mode": "0660"}, "mode: '0660'"),
        ({"kind": "unix", "path": "/x", "owner": 5}, "owner: 5"),
        ({"kind": "unix", "path": "/x", "group": None}, "group: None"),
        ({"kind": "unix", "path": "/x", "backlog": 0}, "backlog: 0"),
    ],
)
def test_an_endpoint_that_is_none_is_an_error_where_it_is_made(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Endpoint(**fields)


@pytest.mark.parametrize("parse", [Endpoint.parse, Endpoint.parse_inet])
@pytest.mark.parametrize("text", [None, 25, b"inet:h:1"])
def test_what_is_no_text_is_no_endpoint(parse: Any, text: Any) -> None:
    with pytest.raises(SettingError, match='expected "inet:host:port"'):
        parse(text)


def test_a_socket_with_a_name_that_is_no_path_has_an_endpoint(opened: list[Listener]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(f"\0socketmap-{os.getpid()}")
        opened.append(take_in(sock, BACKLOG))
    assert str(opened[0].endpoint) == f"unix:@socketmap-{os.getpid()}"


def test_an_error_without_a_number_does_not_tell_one(path: Path) -> None:
    with pytest.raises(ListenError) as raised:
        open_listener(Endpoint("unix", path=f"{path}{'x' * 200}"), BACKLOG)
    assert str(raised.value).startswith("cannot listen on unix:")
