"""HUP: a new generation proves itself, or nothing changes; and no client notices either."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

import pytest

from prefork_socketmap.client import SocketmapClient
from tests.daemon.installation import Installation
from tests.daemon.load import Load
from tests.integration.servers.process import free_port
from tests.processes import descriptors, process_status
from tests.waiting import eventually

PYTHON_MAP = '[maps.answers]\ntype = "python"\npath = ["."]\nfunction = "answers:answer"\n'


def write_answers(installation: Installation, answer: str) -> None:
    """Write the module behind PYTHON_MAP anew: the map gives *answer* to every key."""
    path = installation.directory / "answers.py"
    path.write_text(f"def answer(key):\n    return {answer!r}\n")
    # Python takes a module's compiled form for current when size and second of its source are the same.
    age = len(answer)
    os.utime(path, (age, age))


def test_code_of_a_python_map_is_fresh_after_a_reload_and_not_before(installation: Installation) -> None:
    write_answers(installation, "old")
    installation.configure(maps=PYTHON_MAP)
    installation.start()
    write_answers(installation, "newer")
    assert installation.lookup("answers", "key") == "old"
    assert installation.run("reload").returncode == 0
    assert installation.lookup("answers", "key") == "newer"


def test_a_listener_is_added_and_one_removed(installation: Installation) -> None:
    other = f"inet:127.0.0.1:{free_port()}"
    installation.configure(listen=f'["{installation.endpoint}", "unix:sock"]')
    installation.start()
    installation.configure(listen=f'["{installation.endpoint}", "{other}"]')
    assert installation.run("reload").returncode == 0
    with SocketmapClient(other) as client:
        assert client.lookup("colours", "sky") == "blue"
    assert installation.lookup() == "blue"
    eventually(lambda: not (installation.directory / "sock").exists(), what="the old socket is gone")


def test_no_lookup_is_lost_or_wrong_in_20_reloads_under_load(installation: Installation) -> None:
    write_answers(installation, "x")
    installation.configure("process_limit = 40\n", maps=PYTHON_MAP)
    installation.start()
    expected = {"x" * number for number in range(1, 22)}
    with Load(installation.endpoint, "answers", "key") as load:
        for number in range(2, 22):
            write_answers(installation, "x" * number)
            result = installation.run("reload")
            assert (result.returncode, result.stderr) == (0, "")
    assert load.answers.keys() <= expected
    assert load.answers["x" * 21] > 0
    assert installation.state()["generation"] == 21


def _not_toml(installation: Installation) -> str:
    installation.config.write_text("nonsense")
    return "not TOML"


def _unknown_map_type(installation: Installation) -> str:
    installation.configure(maps='[maps.m]\ntype = "statik"\n')
    return "maps.m.type: 'statik' is not accepted here"


def _import_error(installation: Installation) -> str:
    (installation.directory / "answers.py").write_text("import no_such_module\n")
    installation.configure(maps=PYTHON_MAP)
    return "no_such_module"


def _code_that_kills_its_process(installation: Installation) -> str:
    (installation.directory / "answers.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    installation.configure(maps=PYTHON_MAP)
    return "killed by signal 9 before it was ready"


def _database_missing(installation: Installation) -> str:
    installation.configure(maps='[maps.m]\ntype = "sqlite"\ndbpath = "none.sqlite"\nquery = "SELECT 1"\n')
    return "maps.m.dbpath: cannot open"


def _database_down_at_start(installation: Installation) -> str:
    installation.configure(
        maps=f'[maps.m]\ntype = "redis"\nhosts = ["127.0.0.1:{free_port()}"]\nquery = "GET %s"\nconnect = "start"\n'
    )
    return "maps.m.hosts: cannot connect: 127.0.0.1:"


def _socket_where_a_file_is(installation: Installation) -> str:
    (installation.directory / "file").touch()
    installation.configure(listen=f'["{installation.endpoint}", "unix:file"]')
    return "not a socket"


def _no_permission(installation: Installation) -> str:
    # Not even root may make a socket in /proc.
    installation.configure(listen=f'["{installation.endpoint}", "unix:/proc/1/sock"]')
    return "cannot listen on unix:/proc/1/sock"


MISTAKES: list[Callable[[Installation], str]] = [
    _not_toml,
    _unknown_map_type,
    _import_error,
    _code_that_kills_its_process,
    _database_missing,
    _database_down_at_start,
    _socket_where_a_file_is,
    _no_permission,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_reload_that_goes_wrong_changes_nothing_and_says_why(
    installation: Installation, mistake: Callable[[Installation], str]
) -> None:
    write_answers(installation, "right")
    installation.configure("process_limit = 40\n", maps=PYTHON_MAP)
    process = installation.start()
    with Load(installation.endpoint, "answers", "key", connections=8) as load:
        reason = mistake(installation)
        # Whatever the file has become, the server is where it was.
        process.send_signal(signal.SIGHUP)
        line = installation.logged("reload refused, generation 1 goes on")
        assert reason in line
    assert load.answers.keys() == {"right"}
    assert reason in eventually(lambda: installation.state()["reload"]["problem"], what="the outcome is told")
    assert installation.state()["generation"] == 1

    # And what is right again is taken again.
    write_answers(installation, "repaired")
    installation.configure("process_limit = 40\n", maps=PYTHON_MAP)
    assert installation.run("reload").returncode == 0
    assert installation.lookup("answers", "key") == "repaired"


def test_an_address_in_use_refuses_the_reload(installation: Installation) -> None:
    installation.start()
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        endpoint = f"inet:127.0.0.1:{taken.getsockname()[1]}"
        installation.configure(listen=f'["{endpoint}"]')
        result = installation.run("reload")
    assert result.returncode == 1
    assert f"cannot listen on {endpoint}: Address already in use" in result.stderr
    assert installation.lookup() == "blue"


def test_processes_descriptors_and_memory_stay_level_over_200_reloads(installation: Installation) -> None:
    process = installation.start()
    fresh = descriptors(process.pid)

    def reload_to(generation: int) -> None:
        process.send_signal(signal.SIGHUP)
        installation.await_generation(generation)

    def await_a_fresh_state() -> None:
        # The master gives up what it kept for a worker a moment after that has ended.
        eventually(lambda: len(installation.workers()) == 2, within=30, what="the old generation has left")
        eventually(lambda: not descriptors(process.pid) - fresh, within=30, what="no more descriptors than at first")
        assert process_status(process.pid)["Threads"] == ["1"]

    for generation in range(2, 22):
        reload_to(generation)
    await_a_fresh_state()
    memory = int(process_status(process.pid)["VmRSS"][0])
    for generation in range(22, 202):
        reload_to(generation)
    await_a_fresh_state()
    # A leak of one configuration, or one worker's bookkeeping, per reload would be more.
    assert int(process_status(process.pid)["VmRSS"][0]) - memory < 1024
    assert installation.lookup() == "blue"


def test_the_log_level_can_be_changed_by_a_reload(installation: Installation) -> None:
    installation.start()
    installation.configure("[log]\nlookups = true\n")
    assert installation.run("reload").returncode == 0
    installation.lookup()
    assert "status=OK" in installation.logged("lookup:")
