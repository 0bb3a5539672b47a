"""The examples for programs that use the library do what they say, with the servers that they ask."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefork_socketmap.client import SocketmapClient, TempFail
from prefork_socketmap.testing import serving as served
from tests.integration.servers.postgresql import DATABASE, Postgresql
from tests.integration.servers.postgresql import PASSWORD as POSTGRESQL_PASSWORD
from tests.integration.servers.process import free_port
from tests.integration.servers.redis import PASSWORD as REDIS_PASSWORD
from tests.integration.servers.redis import Redis
from tests.serving import DEADLINE, serving
from tests.waiting import eventually

EXAMPLES = Path(__file__).parent.parent.parent / "etc" / "examples"
TESTED = {
    "sqlite_aliases",
    "redis_domains",
    "asyncio_postgresql",
    "threads",
    "flask_application",
    "tls_policy",
    "asyncio_server",
}


def needs(library: str) -> None:
    """Skip a test, or fail in CI, if a library that an example uses is not installed."""
    if importlib.util.find_spec(library) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{library} is not installed; it is one of '.[test]'")


def example(name: str) -> Any:
    """Import an example, which does not serve then."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def programs() -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that are ended with the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for program in found:
        program.terminate()
        program.communicate(timeout=DEADLINE)


def run(name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_sqlite_with_a_connection_for_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mail.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE aliases (address, destination)")
        database.execute("INSERT INTO aliases VALUES ('info@example.com', 'a'), ('info@example.com', 'b')")
    database.close()
    monkeypatch.setenv("DATABASE", str(path))
    with served(example("sqlite_aliases").server) as client:
        assert client.lookup("aliases", "Info@example.com") == "a,b"
        assert client.lookup("aliases", "nobody@example.com") is None


def test_redis(redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    redis_server.client().sadd("domains", "example.com")
    password = urllib.parse.quote(REDIS_PASSWORD)
    monkeypatch.setenv("REDIS_URL", f"redis://:{password}@127.0.0.1:{redis_server.port}/0")
    with served(example("redis_domains").server) as client:
        assert client.lookup("domains", "Example.com") == "found"
        assert client.lookup("domains", "example.org") is None


def test_coroutines_and_postgresql(postgresql: Postgresql, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("asyncpg")
    postgresql.execute("INSERT INTO alias VALUES ('info@example.com', 'a'), ('info@example.com', 'b')")
    password = urllib.parse.quote(POSTGRESQL_PASSWORD)
    monkeypatch.setenv("DSN", f"postgresql://postfix:{password}@127.0.0.1:{postgresql.port}/{DATABASE}")
    with served(example("asyncio_postgresql").server) as client:
        for _ in range(3):
            assert client.lookup("aliases", "Info@example.com") == "a,b"
            assert client.lookup("aliases", "nobody@example.com") is None
        postgresql.terminate_clients()
        eventually(lambda: _answers_again(client), DEADLINE, "an answer after the connections were lost")


def _answers_again(client: SocketmapClient) -> bool:
    try:
        return client.lookup("aliases", "info@example.com") == "a,b"
    except TempFail:
        return False


def test_a_thread_serves_and_takes_in_maps(directory: Path, programs: list[subprocess.Popen[str]]) -> None:
    endpoint = f"unix:{directory}/socket"
    program = run("threads", endpoint)
    programs.append(program)
    assert program.stdin
    assert program.stdout
    serving(endpoint).close()
    with SocketmapClient(endpoint) as client:
        assert client.lookup("domains", "example.com") == "found"
        program.stdin.write("new value\n")
        program.stdin.flush()
        assert program.stdout.readline() == "new is served\n"
        assert client.lookup("new", "key") == "value"
        program.stdin.write("new again\nstop\n")
        program.stdin.flush()
        assert "'new' is registered already" in program.stdout.readline()
    assert program.wait(DEADLINE) == 0


def test_the_process_of_a_flask_application(tmp_path: Path, programs: list[subprocess.Popen[str]]) -> None:
    needs("flask")
    port, endpoint = free_port(), f"unix:{tmp_path}/socket"
    programs.append(
        run("flask_application", PORT=str(port), ENDPOINT=endpoint, DATABASE=str(tmp_path / "domains.sqlite"))
    )

    def status() -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=DEADLINE) as response:
                return json.load(response)
        except urllib.error.URLError as error:
            raise AssertionError("it does not answer yet") from error

    assert eventually(status, DEADLINE)["endpoints"] == [endpoint]
    with SocketmapClient(endpoint) as client:
        assert client.lookup("domains", "example.com") is None
        put = urllib.request.Request(f"http://127.0.0.1:{port}/domains/example.com", method="PUT")
        urllib.request.urlopen(put, timeout=DEADLINE).close()
        assert client.lookup("domains", "Example.com") == "found"


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        ("Example.com", "secure match=.example.net:example.net"),
        ("sub.example.com", None),
        ("[mail.example.org]:587", "verify"),
        (".bank.example", "dane-only"),
        ("bank.example", None),
        ("", None),
    ],
)
def test_a_tls_policy_by_hand(key: str, policy: str | None) -> None:
    with served(example("tls_policy").server) as client:
        assert client.lookup("tls", key) == policy


def test_a_server_of_nothing_but_asyncio_and_the_codec(programs: list[subprocess.Popen[str]]) -> None:
    endpoint = f"inet:127.0.0.1:{free_port()}"
    programs.append(run("asyncio_server", endpoint.rpartition(":")[2]))
    with serving(endpoint) as client:
        assert client.ask(b"domains example.com") == b"OK found"
        for byte in b"19:domains example.org,":
            client.send(bytes([byte]))
        assert client.reply() == b"NOTFOUND "
        client.send(b"x")
        assert client.reply().startswith(b"PERM ")
