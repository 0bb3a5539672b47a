"""The units under systemd itself, installed as README says."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.machine import mail
from tests.machine.machine import Machine
from tests.machine.visits import visits
from tests.waiting import eventually

NAME = "prefork-socketmap"
SERVICE, SOCKET = f"{NAME}.service", f"{NAME}.socket"
CONFIG = f"/etc/{NAME}/{NAME}.toml"
UNITS = "/usr/local/lib/systemd/system"


@pytest.fixture
def served(installed_by_pip: Machine) -> Iterator[Machine]:
    """A machine whose server runs, with the configuration that is installed; in the end, too."""
    machine = installed_by_pip
    machine.shell(f"cp -p {CONFIG} /tmp/saved; systemctl start {SOCKET} {SERVICE}")
    yield machine
    machine.shell(
        f"rm -rf /etc/systemd/system/{NAME}*.d; cp -p /tmp/saved {CONFIG}; systemctl daemon-reload;"
        # So many starts in so short a time are more than systemd allows a socket.
        f"systemctl stop {SOCKET} {SERVICE}; systemctl reset-failed; systemctl start {SOCKET} {SERVICE}"
    )


def ask(machine: Machine) -> str:
    return machine.run("postmap", "-q", "info@example.com", "socketmap:inet:127.0.0.1:27823:aliases").stdout.strip()


def kill(machine: Machine, number: signal.Signals) -> int:
    """Send a signal to the master; return its process id."""
    pid = machine.pid_of(SERVICE)
    machine.run("kill", f"-{number.name.removeprefix('SIG')}", str(pid))
    return pid


def await_another_master(machine: Machine, before: int) -> None:
    def is_there() -> bool:
        return machine.show(SERVICE, "ActiveState") == "active" and machine.pid_of(SERVICE) not in (0, before)

    eventually(is_there, within=60, what="another master serves")


def test_it_is_started_after_its_sockets_and_answers(served: Machine) -> None:
    assert served.show(SERVICE, "StatusText") == "Answering lookups, generation 1"
    assert ask(served) == "alice@example.com"
    assert served.run("systemctl", "is-enabled", SERVICE, SOCKET).stdout.split() == ["enabled", "enabled"]
    assert "unix:/var/spool/postfix/socketmap/sock" in served.journal("-u", SERVICE)


def test_a_boot_starts_it(served: Machine) -> None:
    """What a boot would start is what the targets want."""
    wanted = served.run("systemctl", "list-dependencies", "--plain", "multi-user.target").stdout.split()
    assert {SERVICE, SOCKET} <= set(wanted)


def test_a_chrooted_postfix_delivers_mail_over_either_socket(served: Machine) -> None:
    mail.assert_the_samples_deliver(served)


def test_a_reload_takes_the_new_configuration(served: Machine) -> None:
    served.shell(f"sed -i s/example.org/new.example/ {CONFIG}")
    served.run("systemctl", "reload", SERVICE)
    assert served.show(SERVICE, "StatusText") == "Answering lookups, generation 2"
    found = served.run("postmap", "-q", "new.example", "socketmap:inet:127.0.0.1:27823:domains").stdout
    assert found == "OK\n"


def test_a_reload_that_is_refused_fails_and_the_server_goes_on(served: Machine) -> None:
    pid = served.pid_of(SERVICE)
    served.shell(f"echo 'nonsense = 1' | cat - /tmp/saved >{CONFIG}")
    assert served.run("systemctl", "reload", SERVICE, check=False).returncode != 0
    assert "nonsense: unknown key" in served.journal("-u", SERVICE)
    assert (served.pid_of(SERVICE), served.show(SERVICE, "ActiveState")) == (pid, "active")
    assert ask(served) == "alice@example.com"


def test_a_restart_fails_no_lookup_of_a_new_connection(served: Machine) -> None:
    pid = served.pid_of(SERVICE)
    with visits(served) as found:
        served.run("systemctl", "restart", SERVICE)
        served.run("systemctl", "restart", SERVICE)
    assert served.pid_of(SERVICE) != pid
    # What was in the accept queue is answered by the next server; what was open is reset, and Postfix asks anew.
    assert all("ConnectionResetError" in problem for problem in found.problems)
    assert len(found.of_new_connections) <= 1


def test_postfix_s_lookups_survive_a_restart(served: Machine) -> None:
    served.write("/tmp/keys", "info@example.com\n" * 5000)
    # Postfix's daemons ignore SIGPIPE and connect again; postmap by itself would end by it.
    asking = served.spawn(
        "sh",
        "-c",
        "trap '' PIPE; postmap -q - socketmap:unix:/var/spool/postfix/socketmap/sock:aliases </tmp/keys | wc -l",
    )
    served.run("systemctl", "restart", SERVICE)
    out, errors = asking.communicate(timeout=60)
    assert (out.strip(), errors) == ("5000", "")


def test_a_crash_is_followed_by_a_restart(served: Machine) -> None:
    before = kill(served, signal.SIGKILL)
    # Nobody is refused meanwhile: systemd has the socket.
    assert ask(served) == "alice@example.com"
    await_another_master(served, before)


def test_a_master_that_hangs_is_replaced_by_the_watchdog(served: Machine) -> None:
    served.shell(f"mkdir -p /etc/systemd/system/{SERVICE}.d")
    served.write(f"/etc/systemd/system/{SERVICE}.d/test.conf", "[Service]\nWatchdogSec=2\nRestartSec=0\n")
    served.shell(f"systemctl daemon-reload; systemctl restart {SERVICE}")
    before = kill(served, signal.SIGSTOP)
    await_another_master(served, before)
    assert "Watchdog timeout" in served.journal("-u", SERVICE)
    assert ask(served) == "alice@example.com"


def test_a_wrong_configuration_is_told_once_and_not_tried_for_ever(served: Machine) -> None:
    served.shell(f"echo 'nonsense = 1' | cat - /tmp/saved >{CONFIG}; systemctl stop {SOCKET} {SERVICE}")
    assert served.run("systemctl", "start", SERVICE, check=False).returncode != 0
    assert served.show(SERVICE, "ExecMainStatus") == "78"
    assert served.show(SERVICE, "ActiveState") == "failed"
    served.run("systemctl", "reset-failed", SERVICE)


def test_a_socket_that_the_server_may_not_make_is_told_once_and_not_tried_for_ever(served: Machine) -> None:
    line = next(line for line in served.shell(f"cat {CONFIG}").splitlines() if "unix:/var/spool" in line)
    served.shell(f"systemctl stop {SOCKET} {SERVICE}")
    served.shell(f"grep -v '^listen' /tmp/saved >{CONFIG}")
    served.write("/tmp/listen", line.lstrip("# ") + "\n")
    served.shell(f"cat /tmp/listen {CONFIG} >/tmp/both && cat /tmp/both >{CONFIG}")
    assert served.run("systemctl", "start", SERVICE, check=False).returncode != 0
    assert served.show(SERVICE, "ExecMainStatus") == "77"
    assert served.show(SERVICE, "ActiveState") == "failed"
    served.run("systemctl", "reset-failed", SERVICE)
    # With the socket unit the same line is right.
    served.shell(f"systemctl start {SOCKET} {SERVICE}")
    found = served.run("postmap", "-q", "example.com", "socketmap:unix:/var/spool/postfix/socketmap/sock:domains")
    assert found.stdout == "OK\n"


def test_several_instances_run_side_by_side(served: Machine) -> None:
    for number, name in enumerate(["one", "two"]):
        served.write(
            f"/etc/{NAME}/{name}.toml",
            f'listen = ["inet:127.0.0.1:{27901 + number}"]\nruntime_dir = "/run/{NAME}-{name}"\n'
            f'[maps.me]\ntype = "static"\nentries = {{ name = "{name}" }}\n',
        )
        served.shell(f"chown root:{NAME} /etc/{NAME}/{name}.toml; systemctl start {NAME}@{name}")
    served.run("systemctl", "reload", f"{NAME}@two")
    for number, name in enumerate(["one", "two"]):
        answer = served.run("prefork-socketmap", "query", f"inet:127.0.0.1:{27901 + number}:me", "name").stdout
        assert answer == f"{name}\n"
    served.shell(f"systemctl stop '{NAME}@*'; rm /etc/{NAME}/one.toml /etc/{NAME}/two.toml")
    assert served.pid_of(SERVICE) != 0


def test_the_unit_hides_from_the_server_what_is_none_of_its_business(served: Machine) -> None:
    status = served.shell(f"cat /proc/{served.pid_of(SERVICE)}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
