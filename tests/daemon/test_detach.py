"""``serve --daemon``: the command returns when lookups are answered, or says why they never will be."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.daemon.installation import COMMAND, TIMEOUT, Installation
from tests.integration.servers.process import free_port
from tests.processes import await_end, children, process_status


def test_the_command_returns_when_lookups_are_answered(installation: Installation) -> None:
    result = installation.run("serve", "--daemon")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert installation.lookup() == "blue"


def test_the_daemon_is_a_process_of_its_own(installation: Installation) -> None:
    installation.run("serve", "--daemon")
    pid = installation.pid
    session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]
    # Neither in our session nor the leader of its own: no terminal can become its controlling one.
    assert int(session) not in (os.getsid(0), pid)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert process_status(pid)["Umask"] == ["0022"]
    assert [str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in range(3)] == ["/dev/null"] * 3


@pytest.mark.parametrize(
    ("maps", "code", "reason"),
    [
        ('[maps.m]\ntype = "statik"\n', os.EX_CONFIG, "maps.m.type: 'statik' is not accepted here"),
        ("nonsense = 1\n", os.EX_CONFIG, "nonsense: unknown key"),
        ('user = "no-such-user"\n[default_map]\n', os.EX_CONFIG, "user: there is no user 'no-such-user'"),
    ],
)
def test_the_command_fails_with_the_reason_on_stderr(
    installation: Installation, maps: str, code: int, reason: str
) -> None:
    installation.configure(maps=maps)
    result = installation.run("serve", "--daemon")
    assert result.returncode == code
    assert f"{installation.config}: {reason}" in result.stderr
    assert installation.run("status").returncode == 3


def test_an_address_in_use_is_a_reason(installation: Installation) -> None:
    with Installation() as other:
        other.start()
        installation.configure(listen=f'["{other.endpoint}"]')
        result = installation.run("serve", "--daemon")
    assert result.returncode == os.EX_UNAVAILABLE
    assert f"cannot listen on {other.endpoint}: Address already in use" in result.stderr


def test_code_that_ends_its_process_at_start_is_a_reason(installation: Installation) -> None:
    (installation.directory / "deadly.py").write_text("import os\nos._exit(3)\n")
    installation.configure(maps='[maps.m]\ntype = "python"\npath = ["."]\nfunction = "deadly:f"\n')
    result = installation.run("serve", "--daemon")
    assert result.returncode == os.EX_UNAVAILABLE
    assert "exited with status 3 before it was ready" in result.stderr


def test_a_place_that_cannot_be_written_is_a_reason(installation: Installation) -> None:
    installation.runtime_dir.touch()
    result = installation.run("serve", "--daemon")
    assert result.returncode == os.EX_UNAVAILABLE
    assert str(installation.runtime_dir) in result.stderr


def test_descriptors_of_the_caller_are_not_kept(installation: Installation) -> None:
    reader, writer = os.pipe()
    result = subprocess.run(
        [*COMMAND, "serve", "--daemon", "-c", installation.config], pass_fds=[writer], check=False, timeout=TIMEOUT
    )
    assert result.returncode == 0
    os.close(writer)
    # The end of the pipe can be seen: nobody else has it open.
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_starting_takes_no_longer_the_higher_the_limit_of_descriptors_is() -> None:
    # Where close_range(2) is missing each number is closed by a call of its own. So what is measured is not time, and
    # no limit of a billion is needed: only what is open is closed.
    program = (
        "import os; calls = []; close = os.close; os.close = lambda fd: (calls.append(fd), close(fd));"
        "os.closerange = lambda low, high: calls.extend(range(low, high));"
        "from prefork_socketmap.daemon import detach; output = os.dup(1); detach._become_daemon([output]);"
        "os.write(output, str(len(calls)).encode())"
    )
    result = subprocess.run([COMMAND[0], "-c", program], stdout=subprocess.PIPE, check=True, timeout=TIMEOUT)
    assert 0 < int(result.stdout) < 100 < resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def test_workers_do_not_outlive_a_daemon_that_is_killed(installation: Installation) -> None:
    installation.run("serve", "--daemon")
    master = installation.pid
    workers = children(master)
    assert workers
    os.kill(master, 9)
    await_end(*workers)


def test_a_port_is_free_again_after_a_start_that_failed(installation: Installation) -> None:
    port = free_port()
    installation.configure(listen=f'["inet:127.0.0.1:{port}"]', maps='[maps.m]\ntype = "statik"\n')
    assert installation.run("serve", "--daemon").returncode != 0
    installation.configure(listen=f'["inet:127.0.0.1:{port}"]')
    assert installation.run("serve", "--daemon").returncode == 0
