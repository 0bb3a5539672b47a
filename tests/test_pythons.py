"""Serving in a thread, on every Python that is found: each forks and handles signals in its own way.

Found are those on PATH, by the names ``python3.11`` and so on and ``pypy3``, and those that the environment variable
``PYTHONS`` names, separated by colons, and those of pyenv. The first of them is the one that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_NEEDS = "setproctitle"
# In CI, as often as it takes to see what fails in one run of twenty; the slow ones wait for a time-out each time.
_ROUNDS, _SLOW_ROUNDS = ("200", "20") if os.environ.get("CI") else ("20", "4")
_TIME = 280

# Each is a program: argv[1] says how to serve, argv[2] how often.
COMMON = """
import gc, sys, tempfile, threading
from prefork_socketmap import Config, Server
from prefork_socketmap.client import LookupTimeout, SocketmapClient, TempFail

def served(server, endpoint):
    serve = server.serve_forever if sys.argv[1] == "serve_forever" else server.start
    thread = threading.Thread(target=serve, daemon=True)  # a failure is not to wait for its end
    thread.start()
    if sys.argv[1] == "start":
        thread.join()
    while True:
        try:
            with SocketmapClient(endpoint) as client:
                client.lookup("ok", "")
            return thread
        except TempFail:
            assert thread.is_alive() or sys.argv[1] == "start"

with tempfile.TemporaryDirectory() as directory:
    for number in range(int(sys.argv[2])):
        endpoint = f"unix:{directory}/{number}"
        server = Server(Config(lookup_timeout=0.2, process_limit=2, min_spare=1))
        server.register_map("ok", lambda key: f"ok {gc.collect()}")
        server.listen(endpoint)
"""

STOPS = """
        thread = served(server, endpoint)
        gc.collect()
        server.shutdown(20)
        thread.join(20)
        assert not thread.is_alive()
"""

INTERRUPTS = """
        def spin(key):
            while True:
                pass
        def sleep(key):
            threading.Event().wait(1000)
        server.register_map("spin", spin)
        server.register_map("sleep", sleep)
        served(server, endpoint)
        with SocketmapClient(endpoint) as client:
            for name in ("spin", "sleep"):
                try:
                    client.lookup(name, "")
                except LookupTimeout as error:
                    assert "lookup timed out" in str(error)
                else:
                    raise AssertionError("an answer")
        server.shutdown(20)
"""


def found() -> list[str]:
    """Return the paths of all Pythons that can be started, the one that runs us first."""
    named = [path for path in os.environ.get("PYTHONS", "").split(":") if path]
    on_path = [shutil.which(name) for name in (*(f"python3.{minor}" for minor in range(12, 30)), "pypy3")]
    others = [path for path in (*named, *on_path, *_of_pyenv()) if path and path != sys.executable and _starts(path)]
    different = {
        Path(path).resolve(): path for path in others if Path(path).resolve() != Path(sys.executable).resolve()
    }
    return [sys.executable, *different.values()]


def _of_pyenv() -> list[str]:
    """Return the Pythons that pyenv has: those on PATH do not start where none has been chosen."""
    if not (pyenv := shutil.which("pyenv")):
        return []
    root = subprocess.run([pyenv, "root"], capture_output=True, text=True, check=True).stdout.strip()
    return [str(path) for path in sorted(Path(root).glob("versions/3.*/bin/python3"))]


def _starts(path: str) -> bool:
    """Whether there is a Python of at least our age: a pyenv shim is on PATH whether or not its Python is there."""
    check = ["-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    return subprocess.run([path, *check], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module", params=found(), ids=lambda path: Path(path).name)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that can import what a server needs: in a virtual environment, if it has not itself."""
    path = str(request.param)
    if subprocess.run([path, "-c", f"import {_NEEDS}"], capture_output=True, check=False).returncode == 0:
        return path
    environment = tmp_path_factory.mktemp("python")
    made = subprocess.run([path, "-m", "venv", str(environment)], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        install = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", _NEEDS]
        made = subprocess.run(install, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"{path} has no {_NEEDS}, and cannot install it: {made.stderr[-300:]}")
    return str(environment / "bin" / "python")


def run(python: str, program: str, how: str, rounds: str) -> None:
    done = subprocess.run(
        [python, "-c", COMMON + program, how, rounds],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")},
        capture_output=True,
        text=True,
        timeout=_TIME,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("how", ["serve_forever", "start"])
def test_a_server_that_serves_in_a_thread_stops_when_it_is_told_to(python: str, how: str) -> None:
    run(python, STOPS, how, _ROUNDS)


@pytest.mark.parametrize("how", ["serve_forever", "start"])
def test_a_lookup_of_a_server_that_serves_in_a_thread_is_interrupted(python: str, how: str) -> None:
    run(python, INTERRUPTS, how, _SLOW_ROUNDS)
