"""The command ``query``: answers on stdout, the kind of answer in the exit code."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import subprocess

import pytest

from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.integration.servers.process import free_port

ANSWERS = """
import sys
from prefork_socketmap import Reply

def answer(key):
    if key == "exit":
        sys.exit()
    return {
        "found": Reply.ok("value"),
        "empty": "",
        "temp": Reply.temp_fail("try later"),
        "perm": Reply.perm_fail("broken"),
        "timeout": Reply.timeout("too slow"),
        "\\udce4": Reply.ok("\\udcf6"),
    }.get(key)
"""
MAPS = '[maps.answers]\ntype = "python"\npath = ["."]\nfunction = "answers:answer"\n'


@pytest.fixture
def server(installation: Installation) -> Installation:
    (installation.directory / "answers.py").write_text(ANSWERS)
    installation.configure(maps=MAPS, listen=f'["{installation.endpoint}", "unix:sock"]')
    installation.start()
    return installation


def query(*arguments: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, "query", *arguments], input=stdin, capture_output=True, check=False, timeout=TIMEOUT
    )


@pytest.mark.parametrize(
    ("key", "code", "output", "problem"),
    [
        ("found", os.EX_OK, b"value\n", ""),
        ("none", 1, b"", ""),
        ("", 1, b"", ""),
        ("empty", os.EX_TEMPFAIL, b"", "invalid reply"),
        ("temp", os.EX_TEMPFAIL, b"", "try later"),
        ("timeout", os.EX_UNAVAILABLE, b"", "too slow"),
        ("perm", os.EX_CONFIG, b"", "broken"),
        ("exit", os.EX_TEMPFAIL, b"", "lookup failed"),
    ],
)
def test_the_exit_code_tells_the_answer(
    server: Installation, key: str, code: int, output: bytes, problem: str
) -> None:
    result = query(f"{server.endpoint}:answers", key)
    assert (result.returncode, result.stdout) == (code, output)
    expected = f"prefork-socketmap: {server.endpoint}:answers: {problem}\n" if problem else ""
    assert result.stderr.decode() == expected


def test_a_unix_socket_is_asked(server: Installation) -> None:
    assert query(f"unix:{server.directory}/sock:answers", "found").stdout == b"value\n"


def test_keys_from_standard_input_are_answered_as_postmap_does(server: Installation) -> None:
    result = query(f"{server.endpoint}:answers", "-", stdin=b"found\nnone\nfound\n")
    assert (result.returncode, result.stdout) == (os.EX_OK, b"found\tvalue\nfound\tvalue\n")


def test_standard_input_without_a_key_that_is_found_is_not_found(server: Installation) -> None:
    assert query(f"{server.endpoint}:answers", "-", stdin=b"none\n").returncode == 1
    assert query(f"{server.endpoint}:answers", "-").returncode == 1


def test_bytes_that_are_not_utf_8_pass_both_ways(server: Installation) -> None:
    assert query(f"{server.endpoint}:answers", b"\xe4").stdout == b"\xf6\n"
    assert query(f"{server.endpoint}:answers", "-", stdin=b"\xe4\n").stdout == b"\xe4\t\xf6\n"


def test_a_server_that_is_not_there_is_a_temporary_error() -> None:
    result = query(f"inet:127.0.0.1:{free_port()}:answers", "key")
    assert result.returncode == os.EX_TEMPFAIL
    assert b"Connection refused" in result.stderr


@pytest.mark.parametrize("where", ["answers", "inet:127.0.0.1:", "tcp:127.0.0.1:1:answers", "inet:h:port:answers"])
def test_an_endpoint_that_is_none_is_wrong_usage(where: str) -> None:
    result = query(where, "key")
    assert result.returncode == os.EX_USAGE
    assert where.encode() in result.stderr


# A map of the config file, with no server.

FILE_MAPS = """
[maps.users]
type = "sqlite"
dbpath = "users.sqlite"
query = "SELECT box FROM users WHERE address = '%s'"
search = "address"

[maps.all]
type = "chain"
maps = ["users"]

[maps.closed]
type = "sqlite"
dbpath = "none.sqlite"
query = "SELECT 1"
"""


@pytest.fixture
def file(installation: Installation) -> Installation:
    """A config file whose maps can be asked without a server."""
    (installation.directory / "answers.py").write_text(ANSWERS)
    with contextlib.closing(sqlite3.connect(installation.directory / "users.sqlite")) as database, database:
        database.execute("CREATE TABLE users (address, box)")
        database.execute("INSERT INTO users VALUES ('@example.com', 'everybody')")
    installation.configure(maps=MAPS + FILE_MAPS)
    return installation


@pytest.mark.parametrize(
    ("key", "code", "output", "problem"),
    [
        ("found", os.EX_OK, b"value\n", ""),
        ("none", 1, b"", ""),
        ("temp", os.EX_TEMPFAIL, b"", "answers: try later"),
        ("timeout", os.EX_UNAVAILABLE, b"", "answers: too slow"),
        ("perm", os.EX_CONFIG, b"", "answers: broken"),
        ("empty", os.EX_TEMPFAIL, b"", "answers: the map returned OK without a value; return any word"),
        ("exit", os.EX_TEMPFAIL, b"", "answers: lookup failed"),
    ],
)
def test_a_map_of_a_file_answers_as_its_server_would(
    file: Installation, key: str, code: int, output: bytes, problem: str
) -> None:
    result = query("-c", str(file.config), "answers", key)
    assert (result.returncode, result.stdout) == (code, output)
    assert problem in result.stderr.decode()
    assert bool(problem) == bool(result.stderr)


def test_what_a_function_raises_is_shown(file: Installation) -> None:
    result = query("-c", str(file.config), "answers", "exit")
    assert b"SystemExit" in result.stderr


def test_keys_from_standard_input_are_asked_of_a_file_s_map(file: Installation) -> None:
    result = query("-c", str(file.config), "users", "-", stdin=b"a@example.com\nb@example.org\n")
    assert (result.returncode, result.stdout) == (os.EX_OK, b"a@example.com\teverybody\n")


def test_only_the_map_that_is_asked_is_opened(file: Installation) -> None:
    assert query("-c", str(file.config), "all", "a@example.com").stdout == b"everybody\n"
    result = query("-c", str(file.config), "closed", "key")
    assert result.returncode == os.EX_CONFIG
    assert f"{file.config}: maps.closed.dbpath: cannot open".encode() in result.stderr


def test_verbose_shows_each_key_the_statement_and_the_time(file: Installation) -> None:
    result = query("-c", str(file.config), "-v", "all", "A@example.com")
    assert result.stdout == b"everybody\n"
    lines = [line.partition("]: ")[2] for line in result.stderr.decode().splitlines()]
    statement = "map users: SELECT box FROM users WHERE address = ? with "
    patterns = [
        re.escape(f"{statement}['a@example.com']"),
        r"map users: 'a@example.com': not found, \d+\.\d ms",
        re.escape(f"{statement}['@example.com']"),
        r"map users: '@example.com': \['everybody'\], \d+\.\d ms",
        r"map all: 'A@example.com': \('everybody',\), \d+\.\d ms",
    ]
    assert len(lines) == len(patterns)
    assert [line for pattern, line in zip(patterns, lines, strict=True) if not re.fullmatch(pattern, line)] == []


def test_an_unknown_map_is_wrong_usage_unless_there_is_a_default_map(file: Installation) -> None:
    result = query("-c", str(file.config), "nonsense", "key")
    assert result.returncode == os.EX_USAGE
    assert b"nonsense: there is no such map; the file has: answers, users, all, closed" in result.stderr
    file.configure(maps='[default_map]\ntype = "static"\nentries = { key = "value" }\n')
    assert query("-c", str(file.config), "nonsense", "key").stdout == b"value\n"


def test_a_wrong_file_is_told_as_check_tells_it(file: Installation) -> None:
    file.configure(maps=MAPS + '[maps.missing]\ntype = "none.such"\n')
    result = query("-c", str(file.config), "answers", "found")
    assert result.returncode == os.EX_CONFIG
    assert f"{file.config}: maps.missing.type: 'none.such' is not accepted here".encode() in result.stderr


def test_code_that_cannot_be_loaded_is_told(file: Installation) -> None:
    (file.directory / "answers.py").write_text("1 / 0\n")
    result = query("-c", str(file.config), "answers", "found")
    assert result.returncode == os.EX_CONFIG
    assert (
        b"maps.answers.function: cannot load 'answers:answer': ZeroDivisionError: division by zero" in result.stderr
    )


def test_verbose_shows_why_an_address_is_undone_or_not(installation: Installation) -> None:
    installation.configure(
        maps="".join(
            f'[maps.{direction}]\ntype = "srs"\ndirection = "{direction}"\ndomain = "fwd.example"\n'
            'secret_file = "secrets"\noriginal_envelope = "database"\n'
            'envelope_database = { dbpath = "senders.sqlite" }\n'
            for direction in ("forward", "reverse")
        )
    )
    (installation.directory / "secrets").write_text("secret\nolder secret\n")
    (installation.directory / "secrets").chmod(0o600)

    def ask(name: str, key: str) -> tuple[str, str]:
        result = query("-c", str(installation.config), "-v", name, key)
        return result.stdout.decode().rstrip("\n"), result.stderr.decode()

    rewritten, told = ask("forward", "user@sender.org")
    assert "map forward: 'user@sender.org': it is in the database, as " in told
    assert "map forward: 'user@sender.org': signed with secret 1 of 2, on day " in told
    sender, told = ask("reverse", rewritten)
    assert sender == "user@sender.org"
    assert f"map reverse: '{rewritten}': signed with secret 1 of 2, 0 days ago" in told
    assert f"map reverse: '{rewritten}': its sender is in the database" in told
    for key, why in {
        rewritten.replace("=1=", "=1=X"): "forged: its hash is made with none of the 2 secrets",
        "SRS0=x@fwd.example": "malformed: parts of it are missing",
        "user@fwd.example": "it is no SRS address",
    }.items():
        assert ask("reverse", key)[0] == ""
        assert f"map reverse: '{key}': {why}" in ask("reverse", key)[1]
    assert "'user@fwd.example': its domain is local" in ask("forward", "user@fwd.example")[1]


def test_verbose_needs_a_file(server: Installation) -> None:
    result = query("-v", f"{server.endpoint}:answers", "found")
    assert result.returncode == os.EX_USAGE
    assert b"-v goes with -c" in result.stderr


@pytest.mark.parametrize("timeout", ["1", "1s", "0.5"])
def test_a_server_that_does_not_answer_is_waited_for_as_long_as_told(timeout: str) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as silent:
        endpoint = f"inet:127.0.0.1:{silent.getsockname()[1]}"
        result = query("--timeout", timeout, f"{endpoint}:answers", "key")
    assert result.returncode == os.EX_UNAVAILABLE
    seconds = float(timeout.rstrip("s"))
    assert result.stderr.decode() == (
        f"prefork-socketmap: {endpoint}:answers: {endpoint}: no reply within {seconds} s\n"
    )


@pytest.mark.parametrize("timeout", ["-1", "soon", "1y", ""])
def test_a_wrong_timeout_is_a_wrong_command_line(timeout: str) -> None:
    result = query(f"--timeout={timeout}", "inet:127.0.0.1:1:m", "key")
    assert result.returncode == os.EX_USAGE
    assert "is not accepted here" in result.stderr.decode()


def test_a_timeout_goes_with_a_server_only(installation: Installation) -> None:
    result = query("-c", str(installation.config), "--timeout", "1", "colours", "sky")
    assert result.returncode == os.EX_USAGE
    assert "--timeout is for a server" in result.stderr.decode()
