"""A running server is found by the config file that it was started with, and no other server is touched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.installation import COMMAND, TIMEOUT, Installation, impostor
from tests.processes import open_files, process_title


def break_syntax(config: Path) -> None:
    config.write_text("listen = [\n")


def remove(config: Path) -> None:
    config.unlink()


def change_directory(config: Path) -> None:
    config.write_text(config.read_text().replace('"run"', '"elsewhere"'))


@pytest.fixture
def other() -> Iterator[Installation]:
    """A second server, which is none of anybody's business."""
    with Installation() as made:
        made.start()
        yield made
        assert made.lookup() == "blue"


@pytest.mark.parametrize("harm", [break_syntax, remove, change_directory])
def test_a_server_is_found_and_stopped_whatever_has_become_of_its_file(
    installation: Installation, other: Installation, harm: object
) -> None:
    process = installation.start()
    assert callable(harm)
    harm(installation.config)
    status = installation.run("status")
    assert status.returncode == 0
    assert f"running, pid {process.pid}, since" in status.stdout
    assert "generation 1" in status.stdout
    assert installation.run("stop").returncode == 0
    assert process.wait(timeout=30) == 0
    assert installation.run("status").returncode == 3


def test_a_server_whose_directory_is_gone_is_found_reloaded_and_stopped(installation: Installation) -> None:
    process = installation.start()
    shutil.rmtree(installation.runtime_dir)
    assert installation.lookup() == "blue"
    status = installation.run("status")
    assert status.returncode == 0
    assert "generation 1" in status.stdout
    assert "colours" in status.stdout
    result = installation.run("reload")
    assert (result.returncode, result.stderr) == (0, "")
    assert "generation 2" in installation.run("status").stdout
    result = installation.run("upgrade")
    assert (result.returncode, result.stderr) == (0, "")
    assert installation.run("stop").returncode == 0
    assert process.wait(timeout=30) == 0


@pytest.mark.parametrize("command", ["stop", "reload", "upgrade"])
def test_another_file_for_the_same_directory_is_an_error_that_names_both(
    installation: Installation, command: str
) -> None:
    process = installation.start()
    new = installation.config.with_name("new.toml")
    shutil.copy(installation.config, new)
    result = subprocess.run(
        [*COMMAND, command, "-c", new], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert result.returncode == 1
    assert str(installation.config) in result.stderr
    assert str(new) in result.stderr
    assert process.poll() is None
    assert installation.state()["generation"] == 1


def test_a_file_that_is_found_under_two_names_is_one(installation: Installation) -> None:
    process = installation.start()
    link = installation.directory / "link.toml"
    link.symlink_to(installation.config)
    result = subprocess.run([*COMMAND, "stop", "-c", link], check=False, timeout=TIMEOUT)
    assert result.returncode == 0
    assert process.wait(timeout=30) == 0


def test_a_program_that_holds_the_pid_file_but_is_no_server_gets_no_signal(installation: Installation) -> None:
    installation.runtime_dir.mkdir()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True);"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, installation.pid_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        result = installation.run("stop")
        assert result.returncode == 1
        assert f"is held by another program, pid {process.pid}" in result.stderr
        assert process.poll() is None
    assert process.returncode == 0
    installation.pid_file.unlink()


def test_a_stop_for_a_file_that_is_not_there_fails_and_says_so(installation: Installation) -> None:
    installation.start()
    missing = installation.directory / "typo.toml"
    command = [*COMMAND, "stop", "-c", str(missing)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    assert result.returncode == os.EX_CONFIG
    assert f"{missing}: cannot be read: No such file or directory" in result.stderr
    assert f"no server runs that was started with {missing}" in result.stderr
    assert installation.lookup() == "blue"


def test_the_server_in_the_default_directory_survives_a_stop_with_a_broken_file(
    installation: Installation, tmp_path: Path
) -> None:
    """In a mount namespace of its own, where the default directory is free."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("no mount namespace can be made here: run the tests as root")
    installation.configure()
    text = installation.config.read_text()
    installation.config.write_text(text.replace('runtime_dir = "run"\n', ""))
    assert "runtime_dir" not in installation.config.read_text()
    broken = tmp_path / "test.toml"
    broken.write_text("listen = [\n")
    script = f"""
        mount -t tmpfs none /run || exit 99
        P="{" ".join(COMMAND)}"
        $P serve --daemon -c {installation.config} || exit 98
        $P stop -c {broken}; echo "stop $?"
        $P stop -c {tmp_path}/typo.toml; echo "stop $?"
        $P reload -c {broken}; echo "reload $?"
        $P status -c {broken}; echo "status $?"
        $P status -c {installation.config} > /dev/null; echo "status $?"
        $P stop -c {installation.config}; echo "stop $?"
    """
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    lines = [line for line in result.stdout.splitlines() if line.split()[-1].isdecimal() and len(line.split()) == 2]
    assert lines == ["stop 1", "stop 1", "reload 1", "status 3", "status 0", "stop 0"], result.stdout + result.stderr
    assert f"is held by the server of {installation.config}" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_what_a_process_of_another_user_says_of_itself_is_not_believed_but_told(installation: Installation) -> None:
    with impostor(installation.config) as pid:
        result = installation.run("stop")
        assert result.returncode == 1
        assert f"not known whether its server runs: process {pid} of user 65534 may be it" in result.stderr
        assert installation.run("status").returncode == 4
        assert installation.run("reload").returncode == 1
        installation.start()
        assert installation.run("status").returncode == 0  # the one that holds the pid file is not in doubt
        assert installation.run("stop").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has signals for everybody")
def test_root_does_not_follow_a_config_file_that_others_can_write(installation: Installation) -> None:
    process = installation.start()
    installation.config.chmod(0o666)
    result = installation.run("status")
    assert "others can write to" in result.stderr
    assert result.returncode == 0  # found by what the process itself says
    installation.config.chmod(0o644)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_the_state_names_file_and_program(installation: Installation) -> None:
    installation.start()
    state = installation.state()
    assert state["config"] == str(installation.config)
    assert state["program"] == sys.executable
    assert state["listening"] == [installation.endpoint]


def test_a_worker_that_has_just_been_forked_is_no_second_server(installation: Installation) -> None:
    """Until it has a title of its own it looks like its master."""
    title = f"prefork-socketmap: master [{installation.config}]"
    code = f"from setproctitle import setproctitle\ndef f(key):\n    setproctitle({title!r})\n    return key\n"
    (installation.directory / "m.py").write_text(code)
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "m:f"\n')
    process = installation.start()
    assert installation.lookup("m", "key") == "key"
    assert [pid for pid in installation.workers() if process_title(pid) == title]
    installation.pid_file.unlink()
    assert installation.run("stop").returncode == 0
    assert process.wait(timeout=30) == 0


def test_workers_cannot_write_what_the_master_says_of_itself(installation: Installation) -> None:
    installation.start()
    for pid in installation.idle_workers():
        assert not [name for name in open_files(pid).values() if "prefork-socketmap-state" in name]
