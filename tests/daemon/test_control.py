"""The commands ``stop`` and ``reload``, with the exit codes that an init script hands on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from tests.daemon.installation import Installation
from tests.processes import is_alive


def test_stop_waits_until_the_server_is_gone(installation: Installation) -> None:
    process = installation.start()
    workers = installation.workers()
    result = installation.run("stop")
    assert (result.returncode, result.stderr) == (0, "")
    assert process.wait(timeout=10) == 0
    assert not any(map(is_alive, workers))
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
    assert installation.run("status").returncode == 0
    assert installation.run("status", "--pid-file", other).returncode == 0
    assert installation.run("status", "--pid-file", installation.pid_file).returncode == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert not other.exists()


def test_no_process_has_libraries_loaded_that_no_map_needs(installation: Installation) -> None:
    """OpenSSL took 3.7 MiB of a master and five workers, which hashed nothing."""
    installation.start()
    for pid in (installation.pid, *installation.workers()):
        loaded = Path(f"/proc/{pid}/maps").read_text()
        assert not any(name in loaded for name in ("libcrypto", "_hashlib", "libsqlite3", "_ssl"))
