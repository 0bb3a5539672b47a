"""The commands ``status``, ``stop`` and ``reload``, with the exit codes that an init script hands on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from tests.daemon.installation import TIMEOUT, Installation, has_ended
from tests.waiting import eventually


def test_status_tells_pid_age_generation_and_workers(installation: Installation) -> None:
    process = installation.start()
    eventually(lambda: len(installation.workers()) == 2, what="two workers")
    result = installation.run("status")
    assert result.returncode == 0
    first, second = result.stdout.splitlines()
    pattern = rf"prefork-socketmap is running, pid {process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(pattern, first)
    assert second == "generation 1, 2 workers"


def test_status_without_a_server_is_3(installation: Installation) -> None:
    result = installation.run("status")
    assert (result.returncode, result.stdout) == (3, "prefork-socketmap is not running\n")


def test_status_after_a_crash_is_1(installation: Installation) -> None:
    process = installation.start()
    process.kill()
    process.wait()
    result = installation.run("status")
    assert result.returncode == 1
    assert str(installation.pid_file) in result.stdout


def test_stop_waits_until_the_server_is_gone(installation: Installation) -> None:
    process = installation.start()
    workers = installation.workers()
    result = installation.run("stop")
    assert (result.returncode, result.stderr) == (0, "")
    assert process.wait(timeout=10) == 0
    assert all(has_ended(worker)() for worker in workers)
    assert list(installation.runtime_dir.iterdir()) == []


def test_stop_waits_for_lookups_under_way(installation: Installation) -> None:
    fifo = installation.directory / "fifo"
    os.mkfifo(fifo)
    (installation.directory / "slow.py").write_text(f"def f(key): return open({str(fifo)!r}).read()\n")
    installation.configure(maps='[maps.slow]\ntype = "python"\npath = ["."]\nfunction = "slow:f"\n')
    installation.start()
    answers: list[str | None] = []
    client = threading.Thread(target=lambda: answers.append(installation.lookup("slow", "key")))
    client.start()
    # A fifo opens for writing when its reader, the lookup, is there.
    with fifo.open("w") as lookup:
        stopper = threading.Thread(target=installation.run, args=["stop"])
        stopper.start()
        installation.logged("stopping")
        assert stopper.is_alive()
        lookup.write("answer")
    client.join(30)
    stopper.join(30)
    assert answers == ["answer"]
    assert not stopper.is_alive()


def test_stop_without_a_server_says_so_and_is_content(installation: Installation) -> None:
    result = installation.run("stop")
    assert (result.returncode, result.stdout) == (0, "prefork-socketmap is not running\n")


def test_a_server_can_be_stopped_when_its_config_file_is_wrong_by_now(installation: Installation) -> None:
    process = installation.start()
    installation.config.write_text('runtime_dir = "run"\nlisten = 5\nnonsense = true\n')
    assert installation.run("stop").returncode == 0
    assert process.wait(timeout=10) == 0


def test_a_server_can_be_stopped_by_its_pid_file_when_its_config_file_is_not_even_toml(
    installation: Installation,
) -> None:
    process = installation.start()
    installation.config.write_text("nonsense")
    assert installation.run("stop", "--pid-file", installation.pid_file).returncode == 0
    assert process.wait(timeout=10) == 0


def test_reload_returns_when_the_new_generation_serves(installation: Installation) -> None:
    installation.start()
    installation.configure(maps='[maps.colours]\ntype = "static"\nentries = { sky = "grey" }\n')
    result = installation.run("reload")
    assert (result.returncode, result.stderr) == (0, "")
    assert installation.lookup() == "grey"
    assert "generation 2" in installation.run("status").stdout


def test_reload_that_is_refused_tells_the_reason(installation: Installation) -> None:
    installation.start()
    installation.configure(maps='[maps.m]\ntype = "statik"\n')
    result = installation.run("reload")
    assert result.returncode == 1
    assert "reload refused, the server goes on as it was:" in result.stderr
    assert f"{installation.config}: maps.m.type: 'statik' is not accepted here" in result.stderr
    assert "the last reload was refused" in installation.run("status").stdout


def test_reload_without_a_server_is_7(installation: Installation) -> None:
    assert installation.run("reload").returncode == 7


def test_a_pid_file_of_the_command_line_comes_before_the_configured_one(installation: Installation) -> None:
    other = installation.directory / "other.pid"
    process = installation.start("--pid-file", str(other))
    assert int(other.read_text()) == process.pid
    assert installation.run("status").returncode == 3
    assert installation.run("status", "--pid-file", other).returncode == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert not other.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_without_the_right_to_know_status_is_4_and_stop_is_refused(installation: Installation) -> None:
    installation.start()
    # All modules first: Python may be installed where only root can read it.
    program = (
        "import os, pwd, sys; from prefork_socketmap.daemon import cli, control;"
        "cli.parser().parse_args(sys.argv[1:]); os.setuid(pwd.getpwnam('nobody').pw_uid);"
        "sys.exit(cli.main(sys.argv[1:]))"
    )

    def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-c", program, command, "-c", str(installation.config)]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT)

    assert as_nobody("status").returncode == 0
    stop = as_nobody("stop")
    assert (stop.returncode, stop.stderr) == (os.EX_NOPERM, "prefork-socketmap: [Errno 1] Operation not permitted\n")
    installation.pid_file.chmod(0o600)
    status = as_nobody("status")
    assert status.returncode == 4
    assert "Permission denied" in status.stderr
    assert installation.lookup() == "blue"
