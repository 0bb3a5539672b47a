"""USR2: another program goes on in the same process, or nothing changes; and no client notices either."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import prefork_socketmap
from prefork_socketmap import Endpoint
from prefork_socketmap.daemon import pidfile
from tests.daemon.installation import TIMEOUT, Installation
from tests.daemon.load import Load
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, descriptors, process_status, process_title
from tests.serving import Client
from tests.waiting import eventually

SETTLED = 30  # seconds, within which a program has started even on a busy machine


class Program:
    """A copy of the package that an installation's server runs; a test changes it as an upgrade would."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lib"
        package = Path(prefork_socketmap.__file__).parent
        shutil.copytree(package, self._path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {"PYTHONPATH": str(self._path)}

    def change(self, module: str, old: str, new: str) -> None:
        """Replace *old*, which *module* has once, by *new*."""
        file = self._path / "prefork_socketmap" / module
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))


@pytest.fixture
def program(installation: Installation) -> Program:
    return Program(installation.directory)


def start(installation: Installation, program: Program) -> subprocess.Popen[str]:
    """Start the server with the copy of the package."""
    # With -m Python looks in the current directory first, and that is the project's.
    return installation.start(env=program.environment, cwd=installation.directory)


def upgrade(installation: Installation) -> None:
    result = installation.run("upgrade")
    assert (result.returncode, result.stderr) == (0, "")


def listening_on(port: int) -> str:
    """Return the inode number of the socket that listens on a TCP port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return next(line[9] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A")


@pytest.fixture
def sockets(installation: Installation) -> list[str]:
    """Endpoints, one over TCP and one on a Unix socket, that the installation is configured with."""
    endpoints = [installation.endpoint, f"unix:{installation.directory}/sock"]
    installation.configure(listen=f'["{endpoints[0]}", {{ endpoint = "{endpoints[1]}", mode = "0660" }}]')
    return endpoints


def test_the_process_and_its_sockets_stay(installation: Installation, sockets: list[str]) -> None:
    process = installation.start()
    file = installation.directory / "sock"
    listeners, since = (listening_on(installation.port), file.stat().st_ino), installation.state()["since"]
    upgrade(installation)
    assert installation.pid == process.pid == pidfile.holder(installation.pid_file)
    assert (listening_on(installation.port), file.stat().st_ino) == listeners
    assert (installation.state()["since"], installation.state()["generation"]) == (since, 2)
    assert f"running, pid {process.pid}" in installation.run("status").stdout
    second = installation.run("serve")
    assert (second.returncode, f"already running with pid {process.pid}" in second.stderr) == (1, True)

    assert installation.run("stop").returncode == 0
    assert process.wait(TIMEOUT) == 0
    assert not file.exists()
    assert list(installation.runtime_dir.iterdir()) == []


def test_silent_connections_go_on_through_three_upgrades(installation: Installation, sockets: list[str]) -> None:
    installation.start()
    clients = [Client(endpoint) for endpoint in sockets * 20]
    for generation in range(2, 5):
        for client in clients:
            assert client.ask(b"colours sky") == b"OK blue"
        upgrade(installation)
        assert installation.state()["generation"] == generation
    for client in clients:
        assert client.ask(b"colours sky") == b"OK blue"
        client.close()


def test_no_lookup_is_lost_in_three_upgrades_under_load(installation: Installation, sockets: list[str]) -> None:
    installation.start()
    with Load(sockets[0], "colours", "sky", 8) as inet, Load(sockets[1], "colours", "sky", 8) as unix:
        for _ in range(3):
            upgrade(installation)
    assert inet.answers.keys() == unix.answers.keys() == {"blue"}


class Gate:
    """Where whoever comes has to wait while it is closed. It is a matter of files, so that any process can come."""

    def __init__(self, directory: Path, name: str) -> None:
        self._closed, self._arrivals = directory / f"{name}.closed", directory / f"{name}.arrivals"
        self.code = (
            f"import os, time\nwith open({str(self._arrivals)!r}, 'a') as arrivals: arrivals.write('x')\n"
            f"while os.path.exists({str(self._closed)!r}): time.sleep(0.01)\n"
        )
        """Lines of Python that come to the gate."""

    def close(self) -> None:
        """Let those that come from now on wait."""
        self._arrivals.write_text("")
        self._closed.touch()

    def await_arrival(self) -> None:
        """Wait until somebody waits at the gate."""
        eventually(self._arrivals.read_text, SETTLED, "somebody at the gate")

    def open(self) -> None:
        """Let everybody go on."""
        self._closed.unlink()


def indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


class Gates:
    """A map, ``gate``, with a gate where it is loaded and another one in its lookup."""

    def __init__(self, installation: Installation) -> None:
        self.loading = Gate(installation.directory, "loading")
        self.lookup = Gate(installation.directory, "lookup")
        code = f"{self.loading.code}\ndef lookup(key):\n{indented(self.lookup.code)}    return 'through'\n"
        (installation.directory / "gate.py").write_text(code)
        installation.configure(maps='[maps.gate]\ntype = "python"\npath = ["."]\nfunction = "gate:lookup"\n')


@pytest.fixture
def gates(installation: Installation) -> Gates:
    return Gates(installation)


def test_a_lookup_under_way_is_answered(installation: Installation, gates: Gates) -> None:
    installation.start()
    gates.lookup.close()
    with Client(installation.endpoint) as client:
        client.request(b"gate key")
        gates.lookup.await_arrival()
        upgrade(installation)
        gates.lookup.open()
        assert client.reply() == b"OK through"
        # And the connection goes on, with a worker of the new program.
        assert client.ask(b"gate key") == b"OK through"


NOT_FOUND = "the lookup map does not exist"


def test_the_program_that_is_installed_by_now_runs(installation: Installation, program: Program) -> None:
    start(installation, program)
    with Client(installation.endpoint) as client:
        assert client.ask(b"none key") == f"TEMP {NOT_FOUND}".encode()
        program.change("service.py", NOT_FOUND, "this is the new program")
        assert client.ask(b"none key") == f"TEMP {NOT_FOUND}".encode()
        assert installation.run("reload").returncode == 0  # forks the workers of the old one
        assert client.ask(b"none key") == f"TEMP {NOT_FOUND}".encode()
        upgrade(installation)
        assert client.ask(b"none key") == b"TEMP this is the new program"


def test_a_program_in_the_current_directory_is_not_taken_for_the_new_one(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(sys.executable).with_name("prefork-socketmap")
    monkeypatch.setattr("tests.daemon.installation.COMMAND", [str(script)])
    package = installation.directory / "prefork_socketmap"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('run by root')\n")
    installation.start(cwd=installation.directory)
    for _ in range(2):
        upgrade(installation)


def test_the_configuration_is_read_again(installation: Installation) -> None:
    process = installation.start()
    other = f"inet:127.0.0.1:{free_port()}"
    installation.configure(listen=f'["{other}", "unix:sock"]')
    upgrade(installation)
    assert listening_on(Endpoint.parse(other).port)
    for endpoint in other, f"unix:{installation.directory}/sock":
        with Client(endpoint) as client:
            assert client.ask(b"colours sky") == b"OK blue"
    with pytest.raises(ConnectionRefusedError):
        Client(installation.endpoint)
    process.terminate()
    assert process.wait(TIMEOUT) == 0
    assert not (installation.directory / "sock").exists()


def _broken_configuration(installation: Installation, program: Program) -> str:
    installation.configure("nonsense = 1\n")
    return "nonsense: unknown key"


def _map_that_cannot_be_opened(installation: Installation, program: Program) -> str:
    installation.configure(maps='[maps.m]\ntype = "sqlite"\ndbpath = "none.sqlite"\nquery = "SELECT 1"\n')
    return "maps.m.dbpath: cannot open"


def _syntax_error(installation: Installation, program: Program) -> str:
    program.change("service.py", "from __future__ import annotations", "from __future__ import")
    return "SyntaxError"


def _other_layout(installation: Installation, program: Program) -> str:
    program.change("prefork/scoreboard.py", "_DEATHS = _PACES", "_DEATHS = 8 + _PACES")
    return "cannot take over from the running one"


def _address_in_use(installation: Installation, program: Program) -> str:
    # Only the new program's first attempt to bind shows this: it refuses what is then a reload.
    installation.configure(listen=f'["{installation.endpoint}", "unix:/proc/1/sock"]')
    return "cannot listen on unix:/proc/1/sock"


def _worker_that_cannot_start(installation: Installation, program: Program) -> str:
    # The check does not see this: the new program runs by then, and has the old one's workers.
    program.change("prefork/worker.py", 'self._set_title("starting")', 'raise ValueError("not today")')
    return "not today"


MISTAKES = [
    _broken_configuration,
    _map_that_cannot_be_opened,
    _syntax_error,
    _other_layout,
    _address_in_use,
    _worker_that_cannot_start,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_an_upgrade_that_goes_wrong_changes_nothing_and_says_why(
    installation: Installation, program: Program, mistake: Callable[[Installation, Program], str]
) -> None:
    start(installation, program)
    workers = installation.idle_workers()
    with Load(installation.endpoint, "colours", "sky", 8) as load:
        reason = mistake(installation, program)
        # The command looks for the server where the file says: it has to stay legible for that.
        result = installation.run("upgrade")
    assert result.returncode == 1
    assert "upgrade refused, the server goes on as it was" in result.stderr
    assert reason in result.stderr
    assert reason in installation.logged("upgrade refused, generation 1 goes on")
    assert load.answers.keys() == {"blue"}
    assert installation.state()["generation"] == 1
    assert set(workers) <= set(installation.workers())


def test_after_a_refusal_what_is_right_again_is_taken(installation: Installation, program: Program) -> None:
    start(installation, program)
    _syntax_error(installation, program)
    assert installation.run("upgrade").returncode == 1
    program.change("service.py", "from __future__ import", "from __future__ import annotations")
    upgrade(installation)
    assert installation.lookup() == "blue"


def test_an_upgrade_without_a_server_is_7(installation: Installation) -> None:
    result = installation.run("upgrade")
    assert (result.returncode, result.stderr) == (7, "prefork-socketmap: not running\n")


def assert_logged(installation: Installation, *texts: str) -> None:
    """Wait until all *texts* stand in the log, in this order."""

    def in_order() -> bool:
        log, position = installation.log.read_text(), 0
        for text in texts:
            position = log.find(text, position) + 1
            assert position, f"no {text!r} where it should be in\n{log}"
        return True

    eventually(in_order, SETTLED)


def test_an_upgrade_waits_for_the_reload_before_it(installation: Installation, gates: Gates) -> None:
    process = installation.start()
    gates.loading.close()
    process.send_signal(signal.SIGHUP)
    gates.loading.await_arrival()
    process.send_signal(signal.SIGUSR2)
    gates.loading.open()
    assert_logged(
        installation,
        *("reloading", "generation 2 serves", "checking the new program", "replacing", "generation 3 serves"),
    )


def test_a_reload_waits_for_the_upgrade_before_it(installation: Installation, gates: Gates) -> None:
    process = installation.start()
    gates.loading.close()
    process.send_signal(signal.SIGUSR2)
    gates.loading.await_arrival()
    process.send_signal(signal.SIGHUP)
    gates.loading.open()
    assert_logged(
        installation,
        *("checking the new program", "replacing", "generation 2 serves", "reloading", "generation 3 serves"),
    )


def test_a_stop_does_not_wait_for_an_upgrade(installation: Installation, gates: Gates) -> None:
    process = installation.start()
    workers = set(installation.idle_workers())
    gates.loading.close()
    process.send_signal(signal.SIGUSR2)
    gates.loading.await_arrival()
    checks = set(children(process.pid)) - workers
    checks.update(*map(children, checks))
    process.terminate()
    assert process.wait(TIMEOUT) == 0
    await_end(*checks, within=10)


@pytest.fixture
def way_in(installation: Installation, program: Program) -> Gate:
    """A gate that the new program comes to before it has handlers for signals."""
    gate = Gate(installation.directory, "way-in")
    program.change("daemon/serve.py", "import argparse\n", f"import argparse\n{gate.code}")
    return gate


def start_to_replace(installation: Installation, program: Program, way_in: Gate) -> subprocess.Popen[str]:
    """Start the server, and replace its program as far as the gate."""
    process = start(installation, program)
    way_in.close()
    process.send_signal(signal.SIGUSR2)
    way_in.await_arrival()
    return process


def test_a_stop_while_the_program_is_replaced_is_not_lost(
    installation: Installation, program: Program, way_in: Gate
) -> None:
    process = start_to_replace(installation, program, way_in)
    process.terminate()
    way_in.open()
    assert process.wait(TIMEOUT) == 0
    assert list(installation.runtime_dir.iterdir()) == []


def test_a_reload_while_the_program_is_replaced_is_not_lost(
    installation: Installation, program: Program, way_in: Gate
) -> None:
    process = start_to_replace(installation, program, way_in)
    process.send_signal(signal.SIGHUP)
    way_in.open()
    assert_logged(installation, "replacing", "generation 2 serves", "reloading", "generation 3 serves")


def test_newcomers_are_answered_while_the_program_is_replaced(
    installation: Installation, program: Program, way_in: Gate
) -> None:
    start_to_replace(installation, program, way_in)
    with Client(installation.endpoint) as client:
        assert client.ask(b"colours sky") == b"OK blue"
        way_in.open()
        installation.await_generation(2, SETTLED)
        assert client.ask(b"colours sky") == b"OK blue"


def test_a_crowd_that_comes_while_the_program_is_replaced_is_not_turned_away(
    installation: Installation, program: Program, way_in: Gate
) -> None:
    start_to_replace(installation, program, way_in)
    with contextlib.ExitStack() as stack:
        # More than the workers have places for: the others wait, and so would a busy machine's for longer than this.
        crowd = [stack.enter_context(Client(installation.endpoint)) for _ in range(100)]
        for client in crowd:
            client.request(b"colours sky")
        time.sleep(2)
        way_in.open()
        for client in crowd:
            assert client.reply() == b"OK blue"
        installation.await_generation(2, SETTLED)
        for client in crowd:
            assert client.ask(b"colours sky") == b"OK blue"


def test_no_worker_outlives_a_master_that_was_upgraded(installation: Installation) -> None:
    process = installation.start()
    upgrade(installation)
    workers = installation.idle_workers()
    process.kill()
    await_end(*workers, within=SETTLED)


def test_a_worker_that_dies_after_an_upgrade_is_replaced(installation: Installation) -> None:
    installation.start()
    upgrade(installation)
    victim = installation.idle_workers()[0]
    os.kill(victim, signal.SIGKILL)
    installation.logged(f"worker {victim} was killed by signal 9; it is replaced")
    assert installation.lookup() == "blue"


def test_descriptors_and_threads_are_level_after_20_upgrades(installation: Installation, sockets: list[str]) -> None:
    process = installation.start()
    clients = [Client(endpoint) for endpoint in sockets * 3]

    def settled(generation: int) -> list[object]:
        for client in clients:
            assert client.ask(b"colours sky") == b"OK blue"
        # Perhaps one more than min_spare: a question may come while the first worker is busy and the second starts.
        idle = {f"prefork-socketmap: worker, generation {generation}, idle"}
        eventually(
            lambda: set(map(process_title, installation.idle_workers())) == idle, SETTLED, "the old workers have left"
        )
        found = descriptors(process.pid)
        del found[f"{installation.runtime_dir}/state.json"]  # it may be being written
        return [found, process_status(process.pid)["Threads"]]

    def upgrade_to(generation: int) -> None:
        process.send_signal(signal.SIGUSR2)
        installation.await_generation(generation, SETTLED)

    upgrade_to(2)
    before = settled(2)
    for generation in range(3, 23):
        upgrade_to(generation)
    assert settled(22) == before
    for client in clients:
        client.close()


def test_a_daemon_in_the_background_is_upgraded_there(installation: Installation) -> None:
    assert installation.run("serve", "--daemon").returncode == 0
    pid = installation.pid
    upgrade(installation)
    assert installation.pid == pid
    assert [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)] == ["/dev/null"] * 3
    assert process_status(pid)["Umask"] == ["0022"]
    assert installation.lookup() == "blue"
