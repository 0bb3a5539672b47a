"""The command ``query``: answers on stdout, the kind of answer in the exit code."""

from __future__ import annotations

import os
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
